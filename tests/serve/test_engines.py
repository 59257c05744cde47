from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from serve.engines import ServeEngine
from serve.errors import Failure
from serve.items import Final, Item
from serve.relay import Relay, Sender, Ticket
from serve.traffic import Target
from serve.versions import VersionId

pytestmark = pytest.mark.anyio

BASE = Target("base", None)
END = Final("end", None)


class Answer:
    """What a handle gives: items, then perhaps an error."""

    def __init__(self, items: list[Item], error: Exception | None) -> None:
        self._items, self._error, self.cancelled = items, error, 0

    async def __aiter__(self) -> AsyncIterator[Item]:
        for item in self._items:
            yield item
        if self._error:
            raise self._error

    def cancel(self) -> None:
        self.cancelled += 1


class Handle:
    """A deployment's handle; its `answer` is its own, and it notes how it was configured."""

    def __init__(self, *items: Item, error: Exception | None = None) -> None:
        self.items, self.error = list(items), error
        self.options_given: list[dict[str, Any]] = []
        self.asked: list[tuple[Any, ...]] = []
        self.given = Answer([], None)

    def options(self, **options: Any) -> Handle:
        self.options_given.append(options)
        return self

    @property
    def answer(self) -> Handle:
        return self

    def remote(self, *arguments: Any) -> Answer:
        self.asked.append(arguments)
        self.given = Answer(self.items, self.error)
        return self.given


async def items(handle: Any, stop_after: int | None = None, target: Target = BASE) -> list[Item]:
    found: list[Item] = []
    async with aclosing(ServeEngine(handle).answer("chat", {"a": 1}, target, "id")) as answer:
        async for item in answer:
            found.append(item)
            if len(found) == stop_after:
                break
    return found


async def test_an_answer_that_is_read_to_its_end_is_not_cancelled() -> None:
    handle = Handle("a", END)
    assert await items(handle) == ["a", END]
    assert handle.asked == [("chat", {"a": 1}, BASE, "id")]
    assert handle.given.cancelled == 0
    assert await items(handle, stop_after=2) == ["a", END]
    assert handle.given.cancelled == 0


async def test_an_answer_that_is_left_is_cancelled() -> None:
    handle = Handle("a", END)
    assert await items(handle, stop_after=1) == ["a"]
    assert handle.given.cancelled == 1


class Streaming:
    """A replica's answer as its handle gives it: a ticket, texts on the connection, and the end through the handle."""

    def __init__(self, relay: Relay, last: Item | Exception) -> None:
        self._relay, self._last, self.cancelled = relay, last, 0

    def options(self, **_: Any) -> Streaming:
        return self

    @property
    def answer(self) -> Streaming:
        return self

    def remote(self, *_: Any) -> Streaming:
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self) -> AsyncIterator[Item | Ticket]:
        async with self._relay.sender() as sender:
            yielded = asyncio.create_task(self._send(sender))
            yield sender.ticket
            await yielded
        if isinstance(self._last, Exception):
            raise self._last
        yield self._last

    async def _send(self, sender: Sender) -> None:
        while sender._writer is None:
            await asyncio.sleep(0.001)
        for text in ("data: 1\n\n", "data: 2\n\n"):
            assert await sender.send(text)
            await asyncio.sleep(0.01)
        sender.close()


async def test_a_ticket_is_followed_and_the_end_comes_through_the_handle(relay: Relay) -> None:
    handle = Streaming(relay, END)
    assert await items(handle) == ["data: 1\n\n", "data: 2\n\n", END]
    assert handle.cancelled == 0


async def test_a_streaming_engine_that_is_lost_is_a_failure_and_one_that_is_left_is_cancelled(relay: Relay) -> None:
    lost = await items(Streaming(relay, RayActorError()))
    assert lost[:2] == ["data: 1\n\n", "data: 2\n\n"]
    assert isinstance(lost[2], Failure)
    handle = Streaming(relay, END)
    assert await items(handle, stop_after=1) == ["data: 1\n\n"]
    assert handle.cancelled == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [(BackPressureError(num_queued_requests=9, max_queued_requests=9), "server_full"), (RayActorError(), "not_ready")],
)
async def test_an_engine_that_is_full_or_lost_is_a_failure(error: Exception, code: str) -> None:
    handle = Handle("a", error=error)
    first, failure = await items(handle)
    assert isinstance(failure, Failure)
    assert (first, failure.status, failure.code, handle.given.cancelled) == ("a", 503, code, 0)


async def test_one_handle_serves_all_versions() -> None:
    handle: Any = Handle(END)
    engine = ServeEngine(handle)
    for target in (BASE, Target("base", VersionId("a", 1))):
        async with aclosing(engine.answer("chat", {}, target, "id")) as answer:
            assert [item async for item in answer] == [END]
    assert handle.options_given == [{"stream": True}]
