"""Keys, limits and caps at the routes, and what the access log keeps of it all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from serve.items import Final
from serve.registry import Registry
from tests.serve.stand_in import CHAT, STREAM, URL, USAGE, Keys, StandIn, client_of, gateway_app

pytestmark = pytest.mark.anyio

CHAT_ROUTE = "/v1/chat/completions"


@pytest.fixture
def keys() -> Keys:
    return Keys()


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which must have OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found: dict[str, Any] = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return found


async def test_every_route_but_health_needs_a_key(engine: StandIn, registry: Registry, keys: Keys) -> None:
    keys.add("app")
    asked = [
        ("POST", CHAT_ROUTE),
        ("POST", "/v1/completions"),
        ("POST", "/tokenize"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/support"),
        ("GET", "/metrics"),
        ("GET", "/admin/versions"),
        ("GET", "/admin/versions/support@v1"),
        ("GET", "/admin/aliases"),
        ("GET", "/admin/aliases/support/history"),
        ("POST", "/admin/aliases/support/promote"),
        ("POST", "/admin/aliases/support/canary"),
        ("POST", "/admin/aliases/support/shadow"),
        ("POST", "/admin/aliases/support/rollback"),
        ("POST", "/admin/versions/support@v1/retire"),
        ("GET", "/admin/replicas"),
    ]
    async with client_of(gateway_app(engine, registry, keys.text)) as client:
        for method, path in asked:
            response = await client.request(method, path, json=CHAT if method == "POST" else None)
            assert error(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    assert engine.asked == []


async def test_a_key_sees_and_uses_its_models_only(engine: StandIn, registry: Registry, keys: Keys) -> None:
    app = keys.add("app", models=("support",))
    async with client_of(gateway_app(engine, registry, keys.text), headers=app) as client:
        assert [card["id"] for card in (await client.get("/v1/models")).json()["data"]] == ["support"]
        assert (await client.get("/v1/models/support")).json()["id"] == "support"
        assert (await client.post(CHAT_ROUTE, json=CHAT)).status_code == 200
        for model in ("base", "support@v1", "no-such-model"):
            found = error(await client.post(CHAT_ROUTE, json={**CHAT, "model": model}), 403)
            assert (found["code"], found["param"]) == ("not_allowed", "model")
            error(await client.get(f"/v1/models/{model}"), 403)


async def test_without_keys_only_this_machine_is_answered(engine: StandIn, registry: Registry) -> None:
    def away(**config: Any) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(gateway_app(engine, registry, **config), client=("203.0.113.5", 1))
        return httpx.AsyncClient(transport=transport, base_url=URL)

    async with away() as client:
        error(await client.post(CHAT_ROUTE, json=CHAT), 403)
    async with away(access={"open": True}) as client:
        assert (await client.post(CHAT_ROUTE, json=CHAT)).status_code == 200
    async with client_of(gateway_app(engine, registry)) as client:
        page = {"origin": "https://evil.example"}
        error(await client.post("/admin/aliases/support/rollback", json={}, headers=page), 403)


@asynccontextmanager
async def in_flight(client: httpx.AsyncClient, engine: StandIn, **options: Any) -> AsyncIterator[None]:
    """A request that is worked on for as long as the context lasts."""
    engine.items = [30.0]
    asked = len(engine.asked)
    task = asyncio.create_task(client.post(CHAT_ROUTE, json=CHAT, **options))
    while len(engine.asked) == asked:
        await asyncio.sleep(0.01)
    engine.items = None
    yield
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_key_that_used_up_its_requests_is_429(engine: StandIn, registry: Registry, keys: Keys) -> None:
    now = 0.0
    app, other = keys.add("app", requests_per_minute=2), keys.add("other")
    async with client_of(gateway_app(engine, registry, keys.text, lambda: now)) as client:
        for left in ("1", "0"):
            response = await client.post(CHAT_ROUTE, json=CHAT, headers=app)
            assert response.status_code == 200
            assert response.headers["x-ratelimit-limit-requests"] == "2"
            assert response.headers["x-ratelimit-remaining-requests"] == left
        response = await client.post(CHAT_ROUTE, json=CHAT, headers=app)
        found = error(response, 429)
        assert (found["type"], found["code"]) == ("rate_limit_error", "rate_limit_exceeded")
        assert response.headers["retry-after"] == "30"
        assert (await client.post(CHAT_ROUTE, json=CHAT, headers=other)).status_code == 200
        now = 30.0
        assert (await client.post(CHAT_ROUTE, json=CHAT, headers=app)).status_code == 200


async def test_tokens_are_settled_by_what_an_answer_took(engine: StandIn, registry: Registry, keys: Keys) -> None:
    app = keys.add("app", tokens_per_minute=600)
    asked = {**CHAT, "max_tokens": 400}
    async with client_of(gateway_app(engine, registry, keys.text, lambda: 0.0), headers=app) as client:

        async def left() -> int:
            response = await client.post("/tokenize", json=CHAT)
            return int(response.headers["x-ratelimit-remaining-tokens"])

        prompt = 600 - await left()  # about, from the body's size; put right by the 10 tokens of the stand-in's usage
        for stream in (False, True):
            before = await left()
            engine.items = [*STREAM] if stream else None
            assert (await client.post(CHAT_ROUTE, json={**asked, "stream": stream})).status_code == 200
            engine.items = None
            assert before - await left() == 2 * (USAGE.prompt_tokens + USAGE.completion_tokens)
        before = await left()
        engine.items = []
        error(await client.post(CHAT_ROUTE, json=asked), 503)
        engine.items = None
        assert before - await left() == USAGE.prompt_tokens + USAGE.completion_tokens
        engine.items = [STREAM[0], STREAM[1], RuntimeError()]
        before = await left()
        await client.post(CHAT_ROUTE, json={**asked, "stream": True})
        assert prompt < before - await left() < 60
        response = await client.post(CHAT_ROUTE, json={**CHAT, "max_tokens": 512, "n": 2})
        error(response, 429)
        assert response.headers["x-should-retry"] == "false"


async def test_requests_at_a_time_of_a_key(engine: StandIn, registry: Registry, keys: Keys) -> None:
    app, other = keys.add("app", concurrency=1), keys.add("other")
    async with client_of(gateway_app(engine, registry, keys.text)) as client:
        async with in_flight(client, engine, headers=app):
            response = await client.post(CHAT_ROUTE, json=CHAT, headers=app)
            assert "1 requests at a time" in error(response, 429)["message"]
            assert response.headers["retry-after"] == "1"
            assert (await client.post(CHAT_ROUTE, json=CHAT, headers=other)).status_code == 200
        assert (await client.post(CHAT_ROUTE, json=CHAT, headers=app)).status_code == 200


async def test_a_full_server_is_503(engine: StandIn, registry: Registry) -> None:
    async with client_of(gateway_app(engine, registry, limits={"total_concurrency": 1})) as client:
        async with in_flight(client, engine):
            response = await client.post(CHAT_ROUTE, json=CHAT)
            assert error(response, 503)["code"] == "server_full"
            assert response.headers["retry-after"] == "1"
            assert "raysft_requests_in_flight" in (await client.get("/metrics")).text
        assert (await client.post(CHAT_ROUTE, json=CHAT)).status_code == 200


async def test_a_large_body_is_413_and_a_large_part_400(engine: StandIn, registry: Registry) -> None:
    async with client_of(gateway_app(engine, registry, caps={"body_bytes": 500, "n": 2})) as client:
        assert error(await client.post(CHAT_ROUTE, content=b" " * 501), 413)["code"] == "body_too_large"
        assert error(await client.post(CHAT_ROUTE, json={**CHAT, "n": 3}), 400)["param"] == "n"
        assert error(await client.post(CHAT_ROUTE, json={**CHAT, "max_tokens": 513}), 400)["param"] == "max_tokens"
    assert engine.asked == []


async def test_a_line_for_every_request(
    engine: StandIn, registry: Registry, keys: Keys, capsys: pytest.CaptureFixture[str]
) -> None:
    app = keys.add("app", models=("support",))
    asked = {**CHAT, "stream": True, "messages": [{"role": "user", "content": "my secret question"}]}
    async with client_of(gateway_app(engine, registry, keys.text), headers=app) as client:
        engine.items = [*STREAM]
        await client.post(CHAT_ROUTE, json=asked, headers={"x-request-id": "one"})
        await client.post(CHAT_ROUTE, json={**asked, "model": "base"}, headers={"x-request-id": "two"})
        await client.get("/admin/versions", headers={"x-request-id": "three"})
        await client.get("/health")
        engine.down = True
        await client.get("/health", headers={"x-request-id": "four"})
    out = capsys.readouterr().out
    assert "secret" not in out
    one, two, three, four = (json.loads(line) for line in out.splitlines())
    assert 0 < one.pop("first_token_s") <= one.pop("total_s")
    assert one.pop("time").endswith("+00:00")
    assert one == {
        "kind": "request",
        "request_id": "one",
        "key": "app",
        "method": "POST",
        "path": CHAT_ROUTE,
        "model": "support",
        "version": "support@v1",
        "part": "stable",
        "stream": True,
        "status": 200,
        "error": None,
        "prompt_tokens": USAGE.prompt_tokens,
        "completion_tokens": USAGE.completion_tokens,
        "finish_reason": "stop",
    }
    assert (two["request_id"], two["key"], two["status"], two["error"]) == ("two", "app", 403, "not_allowed")
    assert (three["request_id"], three["key"], three["status"]) == ("three", "app", 403)
    assert (four["request_id"], four["path"], four["status"]) == ("four", "/health", 503)


async def test_prompts_are_logged_where_that_is_asked_for_and_to_a_file(
    engine: StandIn, registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "access.jsonl"
    log = {"access_file": str(file), "prompts": True}
    engine.items = [Final('{"answer": "never"}', USAGE)]
    async with client_of(gateway_app(engine, registry, log=log)) as client:
        await client.post(CHAT_ROUTE, json=CHAT)
        file.rename(tmp_path / "old.jsonl")
        await client.post("/v1/completions", json={"model": "base", "prompt": "hello"})
    assert json.loads((tmp_path / "old.jsonl").read_text())["prompt"] == CHAT["messages"]
    assert json.loads(file.read_text())["prompt"] == "hello"
    assert "never" not in file.read_text()
    assert capsys.readouterr().out == ""


async def test_the_official_client_understands_what_it_is_told(engine: StandIn, registry: Registry, keys: Keys) -> None:
    headers = keys.add("app", requests_per_minute=4, models=("support", "none"))
    app = gateway_app(engine, registry, keys.text, limits={"first_token_s": 0.05})
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "support@v1"}
    event = {**chunk, "choices": [{"index": 0, "delta": {"content": "hello"}, "finish_reason": None}]}
    text = f"data: {json.dumps(event)}\n\n"
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
        key = headers["authorization"].removeprefix("Bearer ")
        client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=key, max_retries=0, http_client=http)

        async def ask(**fields: Any) -> Any:
            return await client.chat.completions.create(**{**CHAT, **fields})

        with pytest.raises(openai.AuthenticationError):
            await client.with_options(api_key="wrong").models.list()
        assert [model.id async for model in client.models.list()] == ["support"]
        with pytest.raises(openai.PermissionDeniedError, match="may not use the model 'base'"):
            await ask(model="base")
        with pytest.raises(openai.NotFoundError):
            await ask(model="none")
        with pytest.raises(openai.BadRequestError, match="n: 99 is above"):
            await ask(n=99)
        engine.items = [30.0]
        with pytest.raises(openai.InternalServerError, match="the first token took longer"):
            await ask(stream=True)
        engine.items = [text, Final("data: [DONE]\n\n", USAGE)]
        assert [part.choices[0].delta.content async for part in await ask(stream=True)] == ["hello"]
        engine.items = [text, RuntimeError("/secret")]
        with pytest.raises(openai.APIError, match="internal error") as caught:
            [part async for part in await ask(stream=True)]
        assert "secret" not in str(caught.value)
        engine.items = None
        await ask()
        with pytest.raises(openai.RateLimitError) as limited:
            await ask()
        assert limited.value.response.headers["retry-after"] == "15"
        assert limited.value.request_id
