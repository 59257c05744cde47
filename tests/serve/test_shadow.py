"""Canaries and shadows at the routes: who gets what, and what becomes of the copies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.errors import Failure
from serve.items import DONE, Final
from serve.registry import Registry
from serve.versions import VersionId
from tests.serve.stand_in import CHAT, STREAM, USAGE, Keys, Part, StandIn, client_of, gateway_app
from tests.serve.test_metrics import values

pytestmark = pytest.mark.anyio

CHAT_ROUTE = "/v1/chat/completions"
V2 = VersionId("support", 2)
LONG = 30.0


class TwoVoices(StandIn):
    """Answers for the stable version as it is told, and for support@v2 with items of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: Sequence[Part] = [answer("the copy")]

    def said(self, version: VersionId | None) -> Sequence[Part] | None:
        return self.copies if version == V2 else self.items


def answer(text: str) -> Final:
    return Final(json.dumps({"choices": [{"index": 0, "message": {"content": text}}]}), USAGE)


@pytest.fixture
def engine() -> TwoVoices:
    return TwoVoices()


@pytest.fixture
def shadowed(registry: Registry) -> Registry:
    registry.shadow("support", V2, 1)
    return registry


async def quiet() -> None:
    """Waits until no copy runs."""
    async with asyncio.timeout(5):
        while any("Shadows._run" in repr(task) for task in asyncio.all_tasks()):
            await asyncio.sleep(0.01)


def log_lines(capsys: pytest.CaptureFixture[str], kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if line["kind"] == kind]


@pytest.fixture
async def copied(engine: TwoVoices, shadowed: Registry, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway that copies every request, and writes down both answers."""
    log = {"shadow_file": str(tmp_path / "shadow.jsonl")}
    async with client_of(gateway_app(engine, shadowed, log=log)) as client:
        yield client


async def test_a_session_keeps_its_version(client: httpx.AsyncClient, registry: Registry) -> None:
    registry.canary("support", V2, 0.5)

    async def version(user: Any = None, **headers: str) -> str:
        response = await client.post(CHAT_ROUTE, json={**CHAT, "user": user}, headers=headers)
        return response.headers["x-raysft-version"]

    by_user = [{await version(f"user {index}") for _ in range(2)} for index in range(12)]
    assert {len(versions) for versions in by_user} == {1}
    assert set.union(*by_user) == {"support@v1", "support@v2"}
    by_header = [await version(**{"x-raysft-session": f"user {index}"}) for index in range(12)]
    assert by_header == [versions.pop() for versions in by_user]
    # The header wins over the field.
    assert [await version("user 0", **{"x-raysft-session": f"user {index}"}) for index in range(12)] == by_header
    assert {await version() for _ in range(20)} == {"support@v1", "support@v2"}


@pytest.mark.parametrize(
    ("user", "header", "param"),
    [(5, None, "user"), (["a"], None, "user"), ("x" * 257, None, "user"), ("", "x" * 257, None)],
)
async def test_a_session_is_a_short_text(
    client: httpx.AsyncClient, engine: TwoVoices, user: Any, header: str | None, param: str | None
) -> None:
    headers = {"x-raysft-session": header} if header else {}
    response = await client.post(CHAT_ROUTE, json={**CHAT, "user": user}, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    assert engine.asked == []
    assert (await client.post(CHAT_ROUTE, json={**CHAT, "user": "x" * 256})).status_code == 200


async def test_a_copy_goes_to_the_shadow_and_is_never_returned(
    copied: httpx.AsyncClient, engine: TwoVoices, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engine.items = [answer("the answer")]
    response = await copied.post(CHAT_ROUTE, json=CHAT, headers={"x-request-id": "one"})
    await quiet()
    assert response.json()["choices"][0]["message"]["content"] == "the answer"
    assert response.headers["x-raysft-version"] == "support@v1"
    assert [(body, str(target)) for _, body, target in engine.asked] == [(CHAT, "support@v1"), (CHAT, "support@v2")]
    assert engine.ids == ["one", "one-shadow"]
    (line,) = log_lines(capsys, "shadow")
    assert {name: line[name] for name in ("request_id", "model", "version", "part", "error", "finish_reason")} == {
        "request_id": "one",
        "model": "support",
        "version": "support@v2",
        "part": "shadow",
        "error": None,
        "finish_reason": "stop",
    }
    assert (line["prompt_tokens"], line["completion_tokens"], line["status"]) == (7, 3, 200)
    assert line["total_s"] >= 0
    assert "the" not in json.dumps(line)
    (kept,) = [json.loads(text) for text in (tmp_path / "shadow.jsonl").read_text().splitlines()]
    assert (kept["request_id"], kept["model"], kept["messages"]) == ("one", "support", CHAT["messages"])
    for side, version, text in (("answer", "support@v1", "the answer"), ("shadow", "support@v2", "the copy")):
        assert (kept[side]["version"], kept[side]["choices"]) == (version, [{"text": text}])
        assert (kept[side]["error"], kept[side]["completion_tokens"]) == (None, 3)


async def test_both_answers_of_a_stream_are_kept(
    copied: httpx.AsyncClient, engine: TwoVoices, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def event(text: str) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}\n\n"

    engine.items = [event("a"), Final(f"{event('b')}{DONE}", USAGE)]
    engine.copies = [event("c"), 0.05, event("d"), Failure(503, "lost", "server_error", None, "not_ready")]
    response = await copied.post(CHAT_ROUTE, json={**CHAT, "stream": True})
    await quiet()
    assert response.text == f"{event('a')}{event('b')}{DONE}"
    (line,) = log_lines(capsys, "shadow")
    assert (line["status"], line["error"], line["completion_tokens"]) == (503, "not_ready", None)
    assert 0 <= line["first_token_s"] < line["total_s"]
    kept = json.loads((tmp_path / "shadow.jsonl").read_text())
    assert (kept["answer"]["choices"], kept["shadow"]["choices"]) == ([{"text": "ab"}], [{"text": "cd"}])
    assert (kept["answer"]["error"], kept["shadow"]["error"]) == (None, "not_ready")


COPIES: list[tuple[list[Part], str]] = [
    ([RuntimeError("/secret/place")], "internal_error"),
    ([Failure(400, "no", "invalid_request_error")], "refused_by_engine"),
    ([], "not_ready"),
    ([LONG], "timeout"),
]


@pytest.mark.parametrize(("copies", "error"), COPIES, ids=["raised", "refused", "ended early", "slow"])
async def test_whatever_befalls_a_copy_the_answer_is_whole(
    engine: TwoVoices,
    shadowed: Registry,
    capsys: pytest.CaptureFixture[str],
    copies: Sequence[Part],
    error: str,
) -> None:
    engine.items, engine.copies = [*STREAM], copies
    async with client_of(gateway_app(engine, shadowed, limits={"total_s": 0.1})) as client:
        response = await client.post(CHAT_ROUTE, json={**CHAT, "stream": True})
        await quiet()
    assert response.text.endswith(DONE)
    (line,) = log_lines(capsys, "shadow")
    assert line["error"] == error
    assert "secret" not in json.dumps(line)
    assert engine.stopped == (error != "refused_by_engine")


async def test_too_many_copies_are_dropped_and_counted_and_cost_the_key_nothing(
    engine: TwoVoices, shadowed: Registry
) -> None:
    engine.copies = [0.1, answer("late")]
    keys = Keys()
    app = keys.add("app", scopes=("chat", "metrics"), tokens_per_minute=1000)
    traffic = {"shadow_concurrency": 2}
    async with client_of(gateway_app(engine, shadowed, keys.text, traffic=traffic), headers=app) as client:
        for _ in range(5):
            response = await client.post(CHAT_ROUTE, json={**CHAT, "max_tokens": 10})
        await quiet()
        found = values((await client.get("/metrics")).text)
    assert sum(target.version == V2 for _, _, target in engine.asked) == 2
    assert found["raysft_shadows_dropped_total", "support", "0", "support@v2"] == 3
    assert found["raysft_requests_total", "support", "shadow", "0", CHAT_ROUTE, "200", "support@v2"] == 2
    assert found["raysft_requests_total", "support", "stable", "0", CHAT_ROUTE, "200", "support@v1"] == 5
    # Five answers took ten tokens each; the copies are nobody's. The last one is still reserved.
    reserved = 1000 - int(response.headers["x-ratelimit-remaining-tokens"]) - 4 * 10
    assert 10 < reserved < 40


async def test_only_what_is_let_in_and_makes_an_answer_is_copied(engine: TwoVoices, shadowed: Registry) -> None:
    keys = Keys()
    app = keys.add("app", requests_per_minute=1)
    async with client_of(gateway_app(engine, shadowed, keys.text)) as client:
        await client.post("/tokenize", json=CHAT, headers=app)
        response = await client.post(CHAT_ROUTE, json=CHAT, headers=app)
        assert (response.status_code, response.headers["x-raysft-version"]) == (429, "support@v1")
        await quiet()
    assert [route for route, _, _ in engine.asked] == ["tokenize"]


async def test_copies_end_with_the_gateway(
    engine: TwoVoices, shadowed: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.copies = [LONG]
    app = gateway_app(engine, shadowed)
    said: asyncio.Queue[str] = asyncio.Queue()
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def receive() -> dict[str, str]:
        return {"type": await said.get()}

    async def send(message: Any) -> None:
        await heard.put(message["type"])

    life = asyncio.ensure_future(app({"type": "lifespan"}, receive, send))
    await said.put("lifespan.startup")
    assert await heard.get() == "lifespan.startup.complete"
    async with client_of(app) as client:
        assert (await client.post(CHAT_ROUTE, json=CHAT)).status_code == 200
    assert engine.stopped == 0
    await said.put("lifespan.shutdown")
    assert await heard.get() == "lifespan.shutdown.complete"
    await life
    assert engine.stopped == 1
    (line,) = log_lines(capsys, "shadow")
    assert (line["error"], line["status"]) == ("stopped", 499)
