"""The routes against an engine that is a stand-in; tests/engine has them against the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.catalogue import Catalogue
from serve.errors import Failure, NotReadyError
from serve.gateway import Gateway
from serve.registry import Registry
from serve.requests import Route
from serve.traffic import Target
from serve.versions import VersionId
from tests.bundles import tiny_bundle

pytestmark = pytest.mark.anyio

CHAT = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}


class FakeEngine:
    """Answers with what it was asked, or with the items it was given."""

    def __init__(self) -> None:
        self.items: list[str | Failure | Exception] | None = None
        self.asked: list[tuple[Route, dict[str, Any], Target]] = []
        self.down = False

    async def answer(self, route: Route, body: dict[str, Any], target: Target) -> AsyncIterator[str | Failure]:
        self.asked.append((route, body, target))
        for item in [json.dumps({"by": str(target)})] if self.items is None else self.items:
            await asyncio.sleep(0)
            if isinstance(item, Exception):
                raise item
            yield item

    async def check(self) -> None:
        if self.down:
            raise NotReadyError("the engine does not answer")


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry.open(tmp_path / "registry", create=True)
    tiny_bundle(tmp_path / "bundle")
    for _ in range(2):
        made.publish(tmp_path / "bundle", "support")
    made.promote("support", VersionId("support", 1))
    return made


@pytest.fixture
def client(engine: FakeEngine, registry: Registry) -> httpx.AsyncClient:
    gateway = Gateway(Catalogue("base", lambda: registry), engine, max_model_len=512)
    transport = httpx.ASGITransport(gateway.app(), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


@pytest.mark.parametrize(
    ("path", "route"), [("/v1/chat/completions", "chat"), ("/v1/completions", "completions"), ("/tokenize", "tokenize")]
)
async def test_a_request_is_pinned_to_one_version(
    client: httpx.AsyncClient, engine: FakeEngine, path: str, route: str
) -> None:
    response = await client.post(path, json=CHAT)
    assert (response.status_code, response.json()) == (200, {"by": "support@v1"})
    assert response.headers["x-raysft-version"] == "support@v1"
    assert engine.asked == [(route, CHAT, Target("base", VersionId("support", 1)))]


async def test_a_stream_is_passed_on_as_it_comes(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.items = ["data: 1\n\n", "data: 2\n\n", "data: [DONE]\n\n"]
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert response.text == "data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_by_the_engine_is_a_status_even_of_a_stream(
    client: httpx.AsyncClient, engine: FakeEngine, stream: bool
) -> None:
    engine.items = [Failure(400, "too long", "invalid_request_error", "messages")]
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long"


async def test_a_stream_that_breaks_says_so_and_is_not_done(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    engine.items = ["data: 1\n\n", Failure(503, "lost", "server_error"), "data: [DONE]\n\n"]
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": True})
    first, second = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    assert first == "1"
    assert json.loads(second)["error"]["message"] == "lost"


@pytest.mark.parametrize("items", [[], [RuntimeError("/secret/place")]])
async def test_an_engine_that_fails_is_a_quiet_5xx(
    client: httpx.AsyncClient, engine: FakeEngine, items: list[str | Failure | Exception]
) -> None:
    engine.items = items
    response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code in (500, 503)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text


async def test_an_unknown_model_and_a_bad_body_never_reach_the_engine(
    client: httpx.AsyncClient, engine: FakeEngine
) -> None:
    assert (await client.post("/v1/chat/completions", json={**CHAT, "model": "x"})).status_code == 404
    assert (await client.post("/v1/chat/completions", content=b"{")).status_code == 400
    assert engine.asked == []


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("GET", "/docs", 404, "route_not_found"),
        ("GET", "/v1/completions", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_other_routes_have_the_same_shape(
    client: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    response = await client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == code


async def test_the_models_and_their_lineage(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/models")
    cards = {card["id"]: card for card in response.json()["data"]}
    assert list(cards) == ["base", "support", "support@v1", "support@v2"]
    assert cards["base"]["max_model_len"] == 512
    assert (cards["support"]["root"], cards["support"]["parent"]) == ("support@v1", "base")
    assert cards["support@v1"]["metadata"]["lineage"] == {"run": "run-0", "metrics": {"loss": 1.5}}
    assert "secret" not in response.text
    assert (await client.get("/v1/models/support@v2")).json() == cards["support@v2"]
    assert (await client.get("/v1/models/nothing")).status_code == 404


async def test_health_is_the_engines(client: httpx.AsyncClient, engine: FakeEngine) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    engine.down = True
    response = await client.get("/health")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
