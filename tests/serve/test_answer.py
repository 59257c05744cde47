"""What ends an answer early: time, and a client that leaves."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Message

from serve import answer
from serve.items import Final
from serve.registry import Registry
from tests.serve.stand_in import CHAT, STREAM, StandIn, client_of, gateway_app

pytestmark = pytest.mark.anyio

LONG = 30.0
SHORT = 0.05


class Visitor:
    """A client that sends a chat request over bare ASGI, and leaves when it is told to."""

    def __init__(self, app: ASGIApp, body: dict[str, Any]) -> None:
        self.sent: list[Message] = []
        self.leave = asyncio.Event()
        self.reads = True
        self._body: bytes | None = json.dumps(body).encode()
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "method": "POST",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "http_version": "1.1",
            "headers": [(b"host", b"127.0.0.1"), (b"x-request-id", b"visit")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self.task = asyncio.create_task(self._visit(app, scope))

    async def _visit(self, app: ASGIApp, scope: dict[str, Any]) -> None:
        await app(scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.sent.append(message)
        if not self.reads:
            await asyncio.Event().wait()

    async def until(self, messages: int) -> None:
        async with asyncio.timeout(5):
            while len(self.sent) < messages:
                await asyncio.sleep(0.01)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


async def test_a_client_that_leaves_a_stream_stops_the_engine(
    engine: StandIn, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.items = [*STREAM[:2], LONG, STREAM[2]]
    visitor = Visitor(gateway_app(engine, registry), {**CHAT, "stream": True})
    await visitor.until(3)
    visitor.leave.set()
    await asyncio.wait_for(visitor.task, 5)
    assert engine.stopped == 1
    assert [message["type"] for message in visitor.sent] == ["http.response.start", *["http.response.body"] * 2]
    (line,) = lines(capsys)
    assert (line["status"], line["error"], line["completion_tokens"]) == (200, "client_gone", 2)


async def test_a_client_that_leaves_before_the_answer_stops_the_engine(
    engine: StandIn, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.items = [LONG]
    visitor = Visitor(gateway_app(engine, registry), CHAT)
    while not engine.asked:
        await asyncio.sleep(0.01)
    visitor.leave.set()
    await asyncio.wait_for(visitor.task, 5)
    assert (engine.stopped, visitor.sent) == (1, [])
    assert [(line["status"], line["error"]) for line in lines(capsys)] == [(499, "client_gone")]


async def test_a_server_that_cancels_stops_the_engine_and_is_obeyed(
    engine: StandIn, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.items = [STREAM[0], LONG]
    visitor = Visitor(gateway_app(engine, registry), {**CHAT, "stream": True})
    await visitor.until(2)
    visitor.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visitor.task
    assert engine.stopped == 1
    assert [line["error"] for line in lines(capsys)] == ["client_gone"]


async def test_a_client_that_leaves_with_its_answer_is_no_failure(
    engine: StandIn, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    visitor = Visitor(gateway_app(engine, registry), CHAT)
    await visitor.until(2)
    visitor.leave.set()
    await asyncio.wait_for(visitor.task, 5)
    assert engine.stopped == 0
    assert [(line["status"], line["error"]) for line in lines(capsys)] == [(200, None)]


async def test_no_task_is_left_behind(client: httpx.AsyncClient) -> None:
    before = len(asyncio.all_tasks())
    for _ in range(3):
        await client.post("/v1/chat/completions", json=CHAT)
    await asyncio.sleep(0)
    assert len(asyncio.all_tasks()) == before


@pytest.mark.parametrize(
    ("stream", "limits", "what"),
    [
        (True, {"first_token_s": SHORT}, "the first token took longer than the 0.05 s"),
        (True, {"total_s": SHORT}, "the first token took longer than the 0.05 s"),
        (False, {"total_s": SHORT}, "the answer took longer than the 0.05 s"),
    ],
)
async def test_an_answer_that_does_not_come_is_504(
    engine: StandIn, registry: Registry, stream: bool, limits: dict[str, float], what: str
) -> None:
    engine.items = [LONG]
    async with client_of(gateway_app(engine, registry, limits=limits)) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == 504
    assert what in response.json()["error"]["message"]
    assert response.json()["error"]["code"] == "timeout"
    assert response.headers["x-should-retry"] == "false"
    assert engine.stopped == 1


async def test_a_stream_that_takes_too_long_ends_with_an_error(engine: StandIn, registry: Registry) -> None:
    engine.items = [STREAM[0], LONG, STREAM[2]]
    async with client_of(gateway_app(engine, registry, limits={"total_s": SHORT})) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.status_code == 200
    first, second = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    assert (first, json.loads(second)["error"]["code"]) == ("1", "timeout")
    assert engine.stopped == 1


async def test_the_wait_for_the_first_token_does_not_bind_the_rest(engine: StandIn, registry: Registry) -> None:
    engine.items = [STREAM[0], 4 * SHORT, STREAM[2]]
    async with client_of(gateway_app(engine, registry, limits={"first_token_s": 2 * SHORT})) as client:
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.text.endswith("data: [DONE]\n\n")


async def test_what_goes_wrong_after_the_last_word_is_not_told(client: httpx.AsyncClient, engine: StandIn) -> None:
    for stream in (False, True):
        engine.items = [Final("data: [DONE]\n\n", None), RuntimeError("late")]
        response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
        assert (response.status_code, response.text) == (200, "data: [DONE]\n\n")


async def test_a_client_that_stops_reading_does_not_keep_its_place(
    engine: StandIn, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "LAST_WORDS_S", SHORT)
    engine.items = [*STREAM]
    app = gateway_app(engine, registry, limits={"total_s": SHORT, "total_concurrency": 1})
    visitor = Visitor(app, {**CHAT, "stream": True})
    visitor.reads = False
    await asyncio.wait_for(visitor.task, 5)
    assert engine.stopped == 1
    async with client_of(app) as client:
        assert (await client.post("/tokenize", json=CHAT)).status_code == 200


async def test_an_answer_whose_cost_is_unknown_is_still_an_answer(client: httpx.AsyncClient, engine: StandIn) -> None:
    engine.items = [Final("{}", None)]
    assert (await client.post("/v1/chat/completions", json=CHAT)).json() == {}
