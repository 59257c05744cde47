from __future__ import annotations

import time

from serve.cpu_executor import NAP_S, _nap


class Condition:
    """Stands in for a queue's `SpinCondition`."""

    def __init__(self, last_read: float) -> None:
        self.last_read, self.busy_loop_s = last_read, 1.0
        self.waits: list[int | None] = []

    def wait(self, timeout_ms: int | None = None) -> None:
        self.waits.append(timeout_ms)


def test_a_reader_that_read_lately_naps() -> None:
    condition = Condition(time.monotonic())
    _nap(condition)
    busy, begun = time.process_time(), time.monotonic()
    for _ in range(20):
        condition.wait(5)
    assert time.monotonic() - begun >= 20 * NAP_S
    assert time.process_time() - busy < 10 * NAP_S
    assert condition.waits == []


def test_a_reader_without_news_waits_for_some() -> None:
    condition = Condition(time.monotonic() - 2)
    _nap(condition)
    condition.wait(5)
    assert condition.waits == [5]
