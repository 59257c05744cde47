from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.errors import DataError
from sft.feed import BatchFeed, FeedPlan, file_order, shuffled
from sft.mask import UNTRAINED, Example


def example(number: int) -> Example:
    return Example(str(number), np.array([1, number + 2], np.int32), np.array([UNTRAINED, number + 2], np.int32))


def feed(rows: int, global_batch: int = 4, window: int = 5, opened: list[int] | None = None) -> BatchFeed:
    def stream(epoch: int) -> Iterator[Example]:
        if opened is not None:
            opened.append(epoch)
        return (example(i) for i in range(rows))

    return BatchFeed(stream, FeedPlan(3, window, global_batch, 2, "packed", 0))


def step_ids(feed: BatchFeed, epoch: int, step: int, workers: int) -> list[str]:
    return sorted(row for rank in range(workers) for row in feed.share(epoch, step, rank, workers).row_ids)


@given(rows=st.integers(1, 40), size=st.integers(1, 9), window=st.integers(1, 50), workers=st.integers(1, 3))
def test_an_epoch_trains_every_row_exactly_once_whatever_the_number_of_workers(
    rows: int, size: int, window: int, workers: int
) -> None:
    steps = -(-rows // size)
    alone, many = feed(rows, size, window), feed(rows, size, window)
    for epoch in (0, 1):
        seen: Counter[str] = Counter()
        for step in range(steps):
            ids = step_ids(alone, epoch, step, 1)
            assert step_ids(many, epoch, step, workers) == ids
            seen.update(ids)
        assert seen == Counter(str(i) for i in range(rows))


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[str]:
        return [e.id for e in shuffled((example(i) for i in range(20)), seed, epoch, 8)]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert sorted(order(1, 0)[:8], key=int) == [str(i) for i in range(8)]
    assert file_order(6, 1, 0) == file_order(6, 1, 0)
    assert sorted(file_order(6, 1, 0)) == list(range(6))


def test_any_step_can_be_asked_for_again_or_first() -> None:
    straight, jumping = feed(23), feed(23)
    wanted = {(epoch, step): step_ids(straight, epoch, step, 2) for epoch in (0, 1) for step in range(6)}
    for place in ((1, 4), (0, 2), (0, 2), (1, 5), (0, 0)):
        assert step_ids(jumping, *place, 2) == wanted[place]


def test_workers_that_run_apart_do_not_make_it_read_again() -> None:
    opened: list[int] = []
    ahead = feed(40, opened=opened)
    for step in range(10):
        ahead.share(0, step, 0, 2)
        if step >= 3:
            ahead.share(0, step - 3, 1, 2)
    ahead.share(1, 0, 0, 2)
    ahead.share(0, 9, 1, 2)
    assert opened == [0, 1]


def test_fewer_rows_than_counted_is_said() -> None:
    with pytest.raises(DataError, match="epoch 0 ended before step 3"):
        feed(9).share(0, 3, 0, 1)
