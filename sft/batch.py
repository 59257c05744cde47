"""A global batch -> each worker's micro-batches. Pure: no Ray, no torch.

Who computes which example does not change the loss (it is normalised over the global batch), so the examples are
dealt by length: workers get equal work, and examples of one micro-batch are of similar length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from sft.mask import UNTRAINED, Example

Layout = Literal["packed", "padded"]
Matrix = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class MicroBatch:
    """What one forward pass sees; every array has shape (rows, tokens).

    Rule: packed means one row of several documents whose `position_ids` restart at 0, and no attention mask; padded
    means one document a row, filled on the right, and an attention mask. Labels are unshifted; every document begins
    with an untrained label; filling is untrained by position.
    """

    input_ids: Matrix
    labels: Matrix
    position_ids: Matrix
    attention_mask: Matrix | None


@dataclass(frozen=True, slots=True)
class WorkerBatch:
    """One worker's share of a global batch.

    Rule: every worker of a step has the same number of micro-batches; `trained_tokens` counts the whole global batch.
    """

    epoch: int
    step: int
    micro_batches: tuple[MicroBatch, ...]
    trained_tokens: int
    tokens: int
    row_ids: tuple[str, ...]


def deal(examples: Sequence[Example], workers: int, micro_batch_size: int, steps: int) -> list[list[list[int]]]:
    """Deals a global batch: which examples each worker takes, micro-batch by micro-batch.

    Args:
        examples: the global batch, in its order.
        workers: number of workers.
        micro_batch_size: most examples in one micro-batch.
        steps: micro-batches per worker; at least what the examples need. The surplus is empty.

    Returns:
        `[worker][micro-batch] -> indices into examples`.
    """
    assert steps * workers * micro_batch_size >= len(examples), "the micro-batches cannot hold the global batch"
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].input_ids), i))
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
    """Joins examples into one micro-batch; none at all gives a row of two untrained tokens."""
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
        )
    width = max(len(example.input_ids) for example in examples)
    ids = np.full((len(examples), width), pad_id, np.int64)
    labels = np.full((len(examples), width), UNTRAINED, np.int64)
    attention = np.zeros((len(examples), width), np.int64)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        labels[row, :length] = example.labels
        attention[row, :length] = 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int64), ids.shape).copy()
    return MicroBatch(ids, labels, positions, attention)


def worker_batch(
    examples: Sequence[Example],
    *,
    epoch: int,
    step: int,
    rank: int,
    workers: int,
    micro_batch_size: int,
    accumulation: int,
    layout: Layout,
    pad_id: int,
) -> WorkerBatch:
    """Cuts one worker's share out of a global batch."""
    mine = deal(examples, workers, micro_batch_size, accumulation)[rank]
    return WorkerBatch(
        epoch=epoch,
        step=step,
        micro_batches=tuple(collate([examples[i] for i in part], layout, pad_id) for part in mine),
        trained_tokens=sum(example.trained_tokens for example in examples),
        tokens=sum(len(example.input_ids) for example in examples),
        row_ids=tuple(examples[i].id for part in mine for i in part),
    )


def accumulation_steps(global_batch_size: int, workers: int, micro_batch_size: int) -> int:
    """Micro-batches that each worker computes per optimizer step."""
    return -(-global_batch_size // (workers * micro_batch_size))
