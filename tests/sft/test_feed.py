from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.errors import DataError
from sft.feed import BatchFeed, FeedPlan, training_rows
from sft.mask import UNTRAINED, Example


def example(number: int) -> Example:
    return Example(str(number), np.array([1, number + 2], np.int32), np.array([UNTRAINED, number + 2], np.int32))


def feed(
    rows: int, global_batch: int = 4, window: int = 5, opened: list[int] | None = None, counted: int | None = None
) -> BatchFeed:
    def stream(epoch: int) -> Iterator[Example]:
        if opened is not None:
            opened.append(epoch)
        return (example(i) for i in range(rows))

    return BatchFeed(stream, FeedPlan(3, window, global_batch, 2, "padded", 0, 8, rows if counted is None else counted))


def step_ids(feed: BatchFeed, epoch: int, step: int, workers: int) -> list[str]:
    shares = [feed.share(epoch, step, rank, workers) for rank in range(workers)]
    return sorted(row for share in shares if share is not None for part in share.row_ids for row in part)


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
        assert alone.share(epoch, steps, 0, 1) is None


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[str]:
        plan = FeedPlan(seed, 8, 4, 2, "padded", 0, 8)
        return [e.id for row in training_rows((example(i) for i in range(20)), plan, epoch) for e in row]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4
    assert sorted(order(1, 0)[:8], key=int) == [str(i) for i in range(8)]


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


@pytest.mark.parametrize("counted", [8, 10])
def test_other_rows_than_counted_are_said(counted: int) -> None:
    with pytest.raises(DataError, match=f"epoch 0 has 9 examples, not the {counted} that were counted"):
        feed(9, counted=counted).share(0, 3, 0, 1)


def test_a_batch_says_how_much_of_the_epochs_is_done() -> None:
    told = [feed(10).share(1, step, 0, 1) for step in range(4)]
    assert [(t.before, t.after) for t in told if t is not None] == [(1.0, 1.4), (1.4, 1.8), (1.8, 2.0)]
    assert told[3] is None


def test_who_asks_past_the_end_does_not_open_the_epoch_again() -> None:
    opened: list[int] = []
    ahead = feed(8, opened=opened)
    ahead.share(0, 1, 0, 2)
    assert ahead.share(0, 2, 0, 2) is None
    ahead.share(1, 0, 0, 2)
    assert ahead.share(0, 3, 1, 2) is None
    assert opened == [0, 1]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=60),
    window=st.integers(1, 70),
    workers=st.integers(1, 3),
)
def test_packed_epochs_hold_the_same_rows_in_packs_that_fit(lengths: list[int], window: int, workers: int) -> None:
    def stream(_: int) -> Iterator[Example]:
        for number, length in enumerate(lengths):
            ids = np.arange(length, dtype=np.int32)
            yield Example(str(number), ids, np.where(ids > 0, ids, UNTRAINED).astype(np.int32))

    plan = FeedPlan(3, window, 4, 1, "packed", 0, 32, len(lengths))
    served = BatchFeed(stream, plan)
    seen: Counter[str] = Counter()
    for step in itertools.count():
        shares = [served.share(0, step, rank, workers) for rank in range(workers)]
        if shares[0] is None:
            break
        for share in shares:
            assert share is not None
            seen.update(itertools.chain.from_iterable(share.row_ids))
            assert all(micro.input_ids.shape[1] <= 32 for micro in share.micro_batches)
    assert seen == Counter(str(i) for i in range(len(lengths)))
    rows = [tuple(e.id for e in row) for row in training_rows(stream(0), plan, 0)]
    assert rows == [tuple(e.id for e in row) for row in training_rows(stream(0), plan, 0)]
