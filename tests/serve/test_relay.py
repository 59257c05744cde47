"""The connection on which a replica hands its texts to a gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace

import pytest

from serve.relay import SECRET_BYTES, Relay, Sender, Ticket, texts

pytestmark = pytest.mark.anyio


async def read(ticket: Ticket) -> str:
    async with aclosing(texts(ticket)) as parts:
        return "".join([part async for part in parts])


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.001)


async def connected(sender: Sender) -> asyncio.Task[str]:
    reading = asyncio.create_task(read(sender.ticket))
    await until(lambda: sender._writer is not None)
    return reading


async def test_a_gateway_reads_what_the_replica_sends(relay: Relay) -> None:
    async with relay.sender() as sender:
        reading = await connected(sender)
        sent = [f"data: {number} hé\n\n" for number in range(100)]
        assert [await sender.send(text) for text in sent] == [True] * 100
        sender.close()
        assert await reading == "".join(sent)


async def test_answers_do_not_mix(relay: Relay) -> None:
    async with relay.sender() as one, relay.sender() as two:
        readings = [await connected(one), await connected(two)]
        await two.send("data: 2\n\n")
        await one.send("data: 1\n\n")
        one.close()
        two.close()
        assert [await reading for reading in readings] == ["data: 1\n\n", "data: 2\n\n"]


async def test_only_whole_events_are_handed_on(relay: Relay) -> None:
    async with relay.sender() as sender, aclosing(texts(sender.ticket)) as parts:
        following = asyncio.ensure_future(anext(parts))
        await until(lambda: sender._writer is not None)
        await sender.send("data: 1\n\ndata: 2")
        assert await following == "data: 1\n\n"
        await sender.send("0\n\n")
        assert await anext(parts) == "data: 20\n\n"


async def test_without_a_gateway_all_texts_take_the_other_way(relay: Relay) -> None:
    async with relay.sender() as sender:
        assert not await sender.send("data: 1\n\n")
        # One that comes late would get the end of an answer whose beginning went elsewhere.
        assert await read(sender.ticket) == ""
        assert not await sender.send("data: 2\n\n")


async def test_a_ticket_is_for_one(relay: Relay) -> None:
    async with relay.sender() as sender:
        reading = await connected(sender)
        assert await read(sender.ticket) == ""
        assert await read(replace(sender.ticket, secret=bytes(SECRET_BYTES))) == ""
        await sender.send("data: 1\n\n")
        sender.close()
        assert await reading == "data: 1\n\n"
    assert await read(sender.ticket) == ""
    assert relay._senders == {}


async def test_a_gateway_that_left_stops_no_replica(relay: Relay) -> None:
    async with relay.sender() as sender:
        reading = await connected(sender)
        reading.cancel()
        await asyncio.wait({reading})
        for _ in range(200):
            assert await sender.send("data: 1\n\n" * 1000)


async def test_a_replica_that_is_gone_gives_nothing() -> None:
    relay = Relay()
    async with relay.sender() as sender:
        assert relay._server is not None
        relay._server.close()
        await relay._server.wait_closed()
    assert await read(sender.ticket) == ""
