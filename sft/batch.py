"""A global batch -> each worker's micro-batches. Pure: no Ray, no torch.

A training row is one example (padded) or a pack of several (packed). Who computes which row does not change the loss
(it is normalised over the global batch), so rows are dealt by length: workers get equal work, and rows of one
micro-batch are of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft.mask import UNTRAINED, Example
from sft.trace import trace

Layout = Literal["packed", "padded"]
Matrix = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]
Row = Sequence[Example]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass sees; every array has shape (rows, tokens).

    Rule: packed means one row of several documents whose `position_ids` restart at 0, and no attention mask; padded
    means one document a row, filled on the right, and an attention mask. Labels are unshifted; every document begins
    with an untrained label; filling is untrained by position. `weights` are those of the labels; None
    where all count the same.
    """

    input_ids: Matrix
    labels: Matrix
    position_ids: Matrix
    attention_mask: Matrix | None
    weights: Weights | None = None


@dataclass(frozen=True, slots=True)
class WorkerBatch:
    """One worker's share of a global batch.

    Rule: every worker of a step has the same number of micro-batches; `trained_tokens`, `weight` (what the loss is
    divided by: the sum of the labels' weights, or the number of pairs) and `tokens` are those of the whole global
    batch. `before` and `after` say how many epochs are done before and after it, such as 1.25; where an epoch's size is
    not known, both are the epoch's number. `row_ids` are those of this worker's micro-batches; `trace` tells which rows
    the whole global batch holds (`sft.trace`).
    """

    epoch: int
    step: int
    micro_batches: tuple[MicroBatch, ...]
    trained_tokens: int
    weight: float
    tokens: int
    before: float
    after: float
    row_ids: tuple[tuple[str, ...], ...]
    trace: int


def deal(lengths: Sequence[int], workers: int, micro_batch_size: int, steps: int) -> list[list[list[int]]]:
    """Deals a global batch: which rows each worker takes, micro-batch by micro-batch.

    Args:
        lengths: tokens of the global batch's rows, in its order.
        workers: number of workers.
        micro_batch_size: most rows in one micro-batch.
        steps: micro-batches per worker; at least what the rows need. The surplus is empty.

    Returns:
        `[worker][micro-batch] -> indices of rows`.
    """
    assert steps * workers * micro_batch_size >= len(lengths), "the micro-batches cannot hold the global batch"
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    hands: list[list[int]] = [[] for _ in range(workers)]
    for turn, index in enumerate(order):
        lap, seat = divmod(turn, workers)
        hands[seat if lap % 2 == 0 else workers - 1 - seat].append(index)
    used = max(1, -(-max(map(len, hands)) // micro_batch_size))
    dealt = []
    for hand in hands:
        parts = [part.tolist() for part in np.array_split(np.asarray(hand, np.int64), used)]
        dealt.append(parts + [[] for _ in range(steps - used)])
    return dealt


def collate(examples: Sequence[Example], layout: Layout, pad_id: int) -> MicroBatch:
    """Joins examples into one micro-batch, a pair as two documents; none at all gives a row of two untrained tokens."""
    examples = [document for example in examples for document in example.documents]
    if not examples:
        blank = np.full((1, 2), pad_id, np.int64)
        positions = np.arange(2, dtype=np.int64)[None]
        everything = np.ones((1, 2), np.int64) if layout == "padded" else None
        return MicroBatch(blank, np.full((1, 2), UNTRAINED, np.int64), positions, everything)
    if layout == "packed":
        return MicroBatch(
            np.concatenate([example.input_ids for example in examples]).astype(np.int64)[None],
            np.concatenate([example.labels for example in examples]).astype(np.int64)[None],
            np.concatenate([np.arange(len(example.input_ids), dtype=np.int64) for example in examples])[None],
            None,
            None if examples[0].weights is None else np.concatenate([_weights(example) for example in examples])[None],
        )
    width = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), width), pad_id, np.int64)
    labels = np.full((len(examples), width), UNTRAINED, np.int64)
    attention = np.zeros((len(examples), width), np.int64)
    weights = None if examples[0].weights is None else np.zeros((len(examples), width), np.float32)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        attention[row, :length] = 1
        if weights is not None:
            weights[row, :length] = _weights(example)
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy()
    return MicroBatch(ids, labels, positions, attention, weights)


def _weights(example: Example) -> Weights:
    assert example.weights is not None, "either all examples of a run have weights, or none"
    return example.weights


def worker_batch(
    rows: Sequence[Row],
    *,
    epoch: int,
    step: int,
    before: float,
    after: float,
    rank: int,
    workers: int,
    micro_batch_size: int,
    accumulation: int,
    layout: Layout,
    pad_id: int,
) -> WorkerBatch:
    """Cuts one worker's share out of a global batch."""
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    mine = [
        [example for i in part for example in rows[i]]
        for part in deal(lengths, workers, micro_batch_size, accumulation)[rank]
    ]
    trained = sum(example.trained_tokens for row in rows for example in row)
    return WorkerBatch(
        epoch=epoch,
        step=step,
        micro_batches=tuple(collate(part, layout, pad_id) for part in mine),
        trained_tokens=trained,
        weight=_weight([example for row in rows for example in row]),
        tokens=sum(lengths),
        before=before,
        after=after,
        row_ids=tuple(tuple(example.id for example in part) for part in mine),
        trace=trace(example.id for row in rows for example in row),
    )


def _weight(examples: Sequence[Example]) -> float:
    if examples and examples[0].second is not None:
        return float(len(examples))
    if examples and examples[0].weights is not None:
        return float(sum(_weights(example).sum() for example in examples))
    return float(sum(example.trained_tokens for example in examples))


def accumulation_steps(global_batch_size: int, workers: int, micro_batch_size: int) -> int:
    """Micro-batches that each worker computes per optimizer step."""
    return -(-global_batch_size // (workers * micro_batch_size))
