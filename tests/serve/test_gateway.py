"""The routes against an engine that is a stand-in; tests/engine has them against the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.errors import Failure
from serve.items import Item
from serve.registry import Registry
from serve.traffic import Target
from serve.versions import VersionId
from tests.serve.stand_in import CHAT, STREAM, Keys, StandIn, client_of, gateway_app

pytestmark = pytest.mark.anyio

STREAMED = {**CHAT, "stream": True}


@pytest.mark.parametrize(
    ("path", "route"), [("/v1/chat/completions", "chat"), ("/v1/completions", "completions"), ("/tokenize", "tokenize")]
)
async def test_a_request_is_pinned_to_one_version(
    client: httpx.AsyncClient, engine: StandIn, path: str, route: str
) -> None:
    response = await client.post(path, json=CHAT)
    assert (response.status_code, response.json()) == (200, {"by": "support@v1"})
    assert response.headers["x-raysft-version"] == "support@v1"
    assert response.headers["content-type"] == "application/json"
    assert engine.asked == [(route, CHAT, Target("base", VersionId("support", 1)))]


async def test_a_stream_is_passed_on_as_it_comes(client: httpx.AsyncClient, engine: StandIn) -> None:
    engine.items = [*STREAM]
    response = await client.post("/v1/chat/completions", json=STREAMED)
    assert response.text == "data: 1\n\ndata: 2\n\ndata: 3\n\ndata: [DONE]\n\n"
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_by_the_engine_is_a_status_even_of_a_stream(
    client: httpx.AsyncClient, engine: StandIn, stream: bool
) -> None:
    engine.items = [Failure(400, "too long", "invalid_request_error", "messages")]
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long"


BREAKS: list[list[Item | Exception]] = [[Failure(503, "lost", "server_error")], [RuntimeError("/secret/place")], []]


@pytest.mark.parametrize("end", BREAKS, ids=["lost", "raised", "ended early"])
async def test_a_stream_that_breaks_says_so_and_is_not_done(
    client: httpx.AsyncClient, engine: StandIn, end: list[Item | Exception]
) -> None:
    engine.items = ["data: 1\n\n", *end]
    response = await client.post("/v1/chat/completions", json=STREAMED)
    first, second = (line.removeprefix("data: ") for line in response.text.splitlines() if line)
    assert first == "1"
    assert set(json.loads(second)["error"]) == {"message", "type", "param", "code"}
    assert f"(request {response.headers['x-request-id']})" in second
    assert "secret" not in response.text
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("items", [[], [RuntimeError("/secret/place")], [ValueError("File /secret/x.py, line 3")]])
async def test_an_engine_that_fails_is_a_quiet_5xx(
    client: httpx.AsyncClient, engine: StandIn, items: list[Item | Exception | float], stream: bool
) -> None:
    engine.items = items
    response = await client.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert response.status_code in (500, 503)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


async def test_an_unknown_model_and_a_bad_body_never_reach_the_engine(
    client: httpx.AsyncClient, engine: StandIn
) -> None:
    assert (await client.post("/v1/chat/completions", json={**CHAT, "model": "x"})).status_code == 404
    assert (await client.post("/v1/chat/completions", content=b"{")).status_code == 400
    assert (await client.post("/v1/chat/completions", json={**CHAT, "priority": 1})).status_code == 400
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
    assert response.headers["x-request-id"]


async def test_a_body_that_is_said_to_be_no_json_is_refused(client: httpx.AsyncClient) -> None:
    for kind, status in (("text/plain", 415), ("application/json; charset=utf-8", 200)):
        headers = {"content-type": kind}
        response = await client.post("/v1/chat/completions", content=json.dumps(CHAT), headers=headers)
        assert response.status_code == status
    # As curl and clients of plain sockets do it:
    assert (await client.post("/v1/chat/completions", content=json.dumps(CHAT))).status_code == 200


async def test_a_fault_of_our_own_is_a_quiet_500(engine: StandIn, tmp_path: Path) -> None:
    class Broken:
        def version_ids(self) -> list[Any]:
            raise KeyError(str(tmp_path))

        aliases = version_ids

    async with client_of(gateway_app(engine, Broken())) as client:  # type: ignore[arg-type]
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert str(tmp_path) not in response.text


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


async def test_an_alias_shows_its_trials_and_the_retired_are_gone(
    client: httpx.AsyncClient, registry: Registry, tmp_path: Path
) -> None:
    for _ in range(2):
        registry.publish(tmp_path / "bundle", "support")
    registry.canary("support", VersionId("support", 2), 0.25)
    registry.shadow("support", VersionId("support", 3), 1)
    registry.retire(VersionId("support", 4))
    cards = {card["id"]: card for card in (await client.get("/v1/models")).json()["data"]}
    assert list(cards) == ["base", "support", "support@v1", "support@v2", "support@v3"]
    metadata = cards["support"]["metadata"]
    assert metadata["canary"] == {"version": "support@v2", "weight": 0.25}
    assert metadata["shadow"] == {"version": "support@v3", "share": 1.0}
    assert metadata["digest"] == cards["support@v1"]["metadata"]["digest"]
    assert "canary" not in cards["support@v1"]["metadata"]
    assert (await client.get("/v1/models/support@v4")).status_code == 410


async def test_health_is_the_engines_and_needs_no_key(engine: StandIn, registry: Registry) -> None:
    keys = Keys()
    keys.add("app")
    async with client_of(gateway_app(engine, registry, keys.text)) as client:
        assert (await client.get("/health")).json() == {"status": "ok"}
        engine.down = True
        response = await client.get("/health")
        assert (response.status_code, response.json()["error"]["code"]) == (503, "not_ready")
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("given", ["abc", "A.b_c:9-" + "x" * 100])
async def test_a_well_formed_request_id_is_kept(client: httpx.AsyncClient, engine: StandIn, given: str) -> None:
    response = await client.post("/v1/chat/completions", json=CHAT, headers={"x-request-id": given})
    assert response.headers["x-request-id"] == given
    assert engine.ids == [given]


@pytest.mark.parametrize("given", [None, "", "-a", "a b", "a/../b", "x" * 129, "a\tb"])
async def test_any_other_request_id_is_replaced(client: httpx.AsyncClient, engine: StandIn, given: str | None) -> None:
    headers = {} if given is None else {"x-request-id": given}
    response = await client.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])
    assert engine.ids == [response.headers["x-request-id"]]


PASSED_ON: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
    {"structured_outputs": {"regex": r"\d{3}"}},
    {"structured_outputs": {"choice": ["yes", "no"]}},
    {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    {"logprobs": True, "top_logprobs": 5},
    {"include_reasoning": False, "chat_template_kwargs": {"enable_thinking": True}},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"no_such_field": 1},
]


@pytest.mark.parametrize("fields", PASSED_ON, ids=lambda fields: next(iter(fields)))
async def test_what_is_the_engines_business_goes_to_it_unchanged(
    client: httpx.AsyncClient, engine: StandIn, fields: dict[str, Any]
) -> None:
    await client.post("/v1/chat/completions", json={**CHAT, **fields})
    assert engine.asked[0][1] == {**CHAT, **fields}
