"""Parts of a stream that are put together: order, first at once, pauses, errors and closing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import pytest

from serve.gather import gathered

PAUSE_S = 0.05


async def stream(steps: Sequence[float | str], closed: list[bool] | None = None) -> AsyncGenerator[str, None]:
    """Numbers are seconds of silence, texts are parts."""
    try:
        for step in steps:
            if isinstance(step, str):
                yield step
            else:
                await asyncio.sleep(step)
    finally:
        if closed is not None:
            closed.append(True)


def collect(steps: Sequence[float | str]) -> list[list[str]]:
    async def run() -> list[list[str]]:
        return [found async for found in gathered(stream(steps), PAUSE_S)]

    return asyncio.run(run())


def test_what_comes_at_one_time_goes_on_together() -> None:
    assert collect(["role", "first"]) == [["role", "first"]]


def test_the_first_part_waits_for_nothing_and_later_ones_for_a_pause() -> None:
    quick = PAUSE_S / 10
    assert collect(["a", quick, "b", quick, "c", quick, 4 * PAUSE_S, "d", "e"]) == [["a"], ["b", "c"], ["d", "e"]]


def test_the_end_does_not_wait_for_the_pause() -> None:
    async def run() -> float:
        clock = asyncio.get_running_loop().time
        begun_at = clock()
        assert [found async for found in gathered(stream(["a", 0.001, "b", 0.001]), 5)] == [["a"], ["b"]]
        return clock() - begun_at

    assert asyncio.run(run()) < 4


@pytest.mark.parametrize("steps", [[], [0.001]])
def test_an_empty_stream_gives_nothing(steps: list[float | str]) -> None:
    assert collect(steps) == []


def test_an_error_comes_after_what_came_before_it() -> None:
    async def broken() -> AsyncGenerator[str, None]:
        yield "a"
        await asyncio.sleep(0.001)
        yield "b"
        raise ValueError("broken")

    async def run() -> list[list[str]]:
        got = []
        try:
            async for found in gathered(broken(), PAUSE_S):
                got.append(found)  # noqa: PERF401  (what came before the error counts)
        except ValueError as error:
            got.append([str(error)])
        return got

    assert asyncio.run(run()) == [["a"], ["b"], ["broken"]]


def test_a_reader_that_stops_closes_the_stream_at_once() -> None:
    closed: list[bool] = []

    async def run() -> None:
        async with aclosing(gathered(stream(["a", 60.0, "b"], closed), PAUSE_S)) as lists:
            async for found in lists:
                assert found == ["a"]
                break
        assert closed == [True]

    asyncio.run(run())


def test_a_reader_that_is_cancelled_closes_the_stream() -> None:
    closed: list[bool] = []

    async def run() -> None:
        async def read() -> None:
            async with aclosing(gathered(stream(["a", 60.0], closed), PAUSE_S)) as lists:
                async for _ in lists:
                    pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert closed == [True]

    asyncio.run(run())
