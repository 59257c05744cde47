"""A stream's parts, put together as they come: the first at once, later ones as many as come within a short pause."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

Part = TypeVar("Part")


async def gathered(parts: AsyncGenerator[Part, None], pause_s: float) -> AsyncGenerator[list[Part], None]:
    """Hands on what a stream brings, never sooner than a pause after what was handed on last.

    Each hand-over to another process costs as much as several tokens are worth; but nobody waits for a timer: what
    comes after a longer silence, such as the first token, goes on at once.

    Args:
        parts: the stream; it is closed at the end, or when the reader stops.
        pause_s: the shortest time between two lists.

    Yields:
        Parts in their order, at least one.
    """
    waiting: list[Part] = []
    news = asyncio.Event()

    async def read() -> None:
        try:
            async with aclosing(parts):
                async for part in parts:
                    waiting.append(part)
                    news.set()
        finally:
            news.set()

    clock = asyncio.get_running_loop().time
    reader = asyncio.create_task(read())
    free_at = clock()
    try:
        while not (reader.done() and not waiting):
            await news.wait()
            early = free_at - clock()
            if early > 0 and not reader.done():
                await asyncio.wait({reader}, timeout=early)
            news.clear()
            if reader.done():
                news.set()
            if waiting:
                free_at = clock() + pause_s
                found, waiting[:] = waiting[:], []
                yield found
        reader.result()
    finally:
        reader.cancel()
        await asyncio.wait({reader})
