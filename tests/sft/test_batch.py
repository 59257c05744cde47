from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.batch import Layout, accumulation_steps, collate, deal, worker_batch
from sft.mask import UNTRAINED, Example
from sft.trace import trace


def example(length: int, trained: int = 1, start: int = 10) -> Example:
    ids = np.arange(start, start + length, dtype=np.int32)
    labels = ids.copy()
    labels[: length - trained] = UNTRAINED
    return Example(f"{start}+{length}", ids, labels)


TWO = [example(3, 1), example(2, 1, start=20)]


def test_packed_is_one_row_with_restarting_positions() -> None:
    made = collate(TWO, "packed", pad_id=0)
    assert made.input_ids.tolist() == [[10, 11, 12, 20, 21]]
    assert made.labels.tolist() == [[-100, -100, 12, -100, 21]]
    assert made.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert made.attention_mask is None


def test_padded_fills_on_the_right_and_never_trains_the_filling() -> None:
    made = collate(TWO, "padded", pad_id=21)
    assert made.input_ids.tolist() == [[10, 11, 12], [20, 21, 21]]
    assert made.labels.tolist() == [[-100, -100, 12], [-100, 21, -100]]
    assert made.position_ids.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert made.attention_mask is not None
    assert made.attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_no_examples_make_a_row_that_trains_nothing(layout: Layout) -> None:
    made = collate([], layout, pad_id=7)
    assert made.input_ids.tolist() == [[7, 7]]
    assert made.labels.tolist() == [[-100, -100]]


def test_deals_by_length_and_evenly() -> None:
    assert deal((2, 9, 3, 8, 4, 7), workers=2, micro_batch_size=2, steps=2) == [[[1, 4], [2]], [[3, 5], [0]]]


@given(
    lengths=st.lists(st.integers(2, 30), min_size=1, max_size=24),
    workers=st.integers(1, 4),
    micro=st.integers(1, 5),
    data=st.data(),
)
def test_every_example_is_trained_exactly_once_by_one_worker(
    lengths: list[int], workers: int, micro: int, data: st.DataObject
) -> None:
    examples = [
        example(length, data.draw(st.integers(1, length - 1)), start=100 * i) for i, length in enumerate(lengths)
    ]
    accumulation = accumulation_steps(len(examples) + data.draw(st.integers(0, 9)), workers, micro)
    shares = [
        worker_batch(
            [[e] for e in examples],
            epoch=1,
            step=2,
            before=0.0,
            after=0.0,
            rank=rank,
            workers=workers,
            micro_batch_size=micro,
            accumulation=accumulation,
            layout=data.draw(st.sampled_from(["packed", "padded"])),
            pad_id=0,
        )
        for rank in range(workers)
    ]
    assert Counter(row for share in shares for part in share.row_ids for row in part) == Counter(e.id for e in examples)
    assert {len(share.micro_batches) for share in shares} == {accumulation}
    trained = sum(int((m.labels != UNTRAINED).sum()) for share in shares for m in share.micro_batches)
    assert {share.trained_tokens for share in shares} == {trained} == {sum(e.trained_tokens for e in examples)}
    assert {share.trace for share in shares} == {trace(e.id for e in examples)}
    counts = [sum(map(len, share.row_ids)) for share in shares]
    assert max(counts) - min(counts) <= 1
