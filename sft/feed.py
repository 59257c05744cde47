"""Epochs of examples as numbered global batches, and each worker's share of one.

The order is a function of (seed, epoch) alone: files are permuted, then rows within windows of the stream. Whoever
asks names the epoch, the step and the number of workers, so a feed holds no position of its own and resuming, or
resuming with another number of workers, is just asking for another step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sft.batch import Layout, WorkerBatch, accumulation_steps, worker_batch
from sft.errors import DataError
from sft.mask import Example

KEPT_STEPS = 8
"""Global batches that stay at hand: workers are at most their prefetch depth apart."""


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """How examples become batches."""

    seed: int
    shuffle_window: int
    global_batch_size: int
    micro_batch_size: int
    layout: Layout
    pad_id: int


def shuffled(examples: Iterable[Example], seed: int, epoch: int, window: int) -> Iterator[Example]:
    """Shuffles a stream within windows of `window` examples; at most one window is held."""
    held: list[Example] = []
    number = 0
    for example in examples:
        held.append(example)
        if len(held) == window:
            yield from _permuted(held, seed, epoch, number)
            held, number = [], number + 1
    yield from _permuted(held, seed, epoch, number)


def file_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch reads its files."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(count)]


class BatchFeed:
    """Serves workers' shares of global batches.

    Args:
        stream: makes the stream of examples of an epoch, from its start and in a fixed order.
        plan: how examples become batches.
    """

    def __init__(self, stream: Callable[[int], Iterable[Example]], plan: FeedPlan) -> None:
        self._stream = stream
        self._plan = plan
        self._batches: Iterator[tuple[int, list[Example]]] = iter(())
        self._epoch = -1
        self._next = 0
        self._kept: OrderedDict[tuple[int, int], list[Example]] = OrderedDict()

    def share(self, epoch: int, step: int, rank: int, workers: int) -> WorkerBatch:
        """One worker's share of one step of one epoch (both counted from 0).

        Raises:
            DataError: the epoch has no such step: the data changed since it was counted.
        """
        plan = self._plan
        return worker_batch(
            self._global_batch(epoch, step),
            epoch=epoch,
            step=step,
            rank=rank,
            workers=workers,
            micro_batch_size=plan.micro_batch_size,
            accumulation=accumulation_steps(plan.global_batch_size, workers, plan.micro_batch_size),
            layout=plan.layout,
            pad_id=plan.pad_id,
        )

    def _global_batch(self, epoch: int, step: int) -> Sequence[Example]:
        kept = self._kept.get((epoch, step))
        if kept is not None:
            return kept
        if epoch != self._epoch or step < self._next:
            self._open(epoch)
        for number, batch in self._batches:
            self._next = number + 1
            self._kept[epoch, number] = batch
            if len(self._kept) > KEPT_STEPS:
                self._kept.popitem(last=False)
            if number == step:
                return batch
        raise DataError(
            f"epoch {epoch} ended before step {step}: the data has fewer rows than when it was counted; "
            "keep the files unchanged during a run"
        )

    def _open(self, epoch: int) -> None:
        plan = self._plan
        order = shuffled(self._stream(epoch), plan.seed, epoch, plan.shuffle_window)
        self._batches = enumerate(_grouped(order, plan.global_batch_size))
        self._epoch, self._next = epoch, 0


def _grouped(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        group.append(example)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _permuted(held: Sequence[Example], seed: int, epoch: int, window: int) -> Iterator[Example]:
    for i in np.random.default_rng([seed, epoch, window]).permutation(len(held)):
        yield held[i]
