"""The gateway behind a real HTTP server, with clients that behave badly on real sockets."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from serve.registry import Registry
from tests.serve.served import served, until
from tests.serve.stand_in import CHAT, STREAM, StandIn, gateway_app

pytestmark = pytest.mark.anyio

LONG = 30.0


def message(body: bytes, *headers: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        *headers,
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


def whole(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    return message(data, f"Content-Length: {len(data)}")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_socket_that_is_closed_stops_the_engine(engine: StandIn, registry: Registry, stream: bool) -> None:
    engine.items = [*(STREAM[:2] if stream else []), LONG]
    async with served(gateway_app(engine, registry)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(whole({**CHAT, "stream": stream}))
        if stream:
            await asyncio.wait_for(reader.readuntil(b"data: 2\n\n"), 5)
        await until(lambda: len(engine.asked) == 1)
        assert engine.stopped == 0
        writer.close()
        await until(lambda: engine.stopped == 1)


async def test_a_connection_is_kept_from_answer_to_answer(engine: StandIn, registry: Registry) -> None:
    async with served(gateway_app(engine, registry)) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(3):
            writer.write(whole(CHAT))
            answer = await asyncio.wait_for(reader.readuntil(b'{"by": "support@v1"}'), 5)
            assert answer.startswith(b"HTTP/1.1 200 OK")
        writer.close()
    assert engine.stopped == 0


async def test_an_endless_body_is_cut_off(engine: StandIn, registry: Registry) -> None:
    async with served(gateway_app(engine, registry, caps={"body_bytes": 1000})) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        chunk = b"3e8\r\n" + b" " * 1000 + b"\r\n"
        writer.write(message(chunk + chunk, "Transfer-Encoding: chunked"))
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b'"code":"body_too_large"' in answer


async def test_a_client_with_too_much_to_say_still_hears_the_answer(engine: StandIn, registry: Registry) -> None:
    async with (
        served(gateway_app(engine, registry)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        response = await client.post("/tokenize", content=b" " * 16 * 2**20)
        assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")
        assert (await client.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_a_body_that_does_not_come_is_408(engine: StandIn, registry: Registry) -> None:
    async with served(gateway_app(engine, registry, limits={"body_s": 0.1})) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(message(b"{", "Content-Length: 1000"))
        answer = await asyncio.wait_for(reader.readuntil(b"}}"), 5)
        writer.close()
    assert answer.startswith(b"HTTP/1.1 408 Request Timeout")
    assert b'"code":"request_timeout"' in answer
