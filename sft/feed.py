"""Epochs of examples as numbered global batches, and each worker's share of one.

The order is a function of (seed, epoch) alone: files are permuted, then rows within windows of the stream. Whoever
asks names the epoch, the step and the number of workers, so a feed holds no position of its own and resuming, or
resuming with another number of workers, is just asking for another step. Examples are counted, not assumed: an epoch
is over when its stream is, and where its size is known it must have been that.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sft.batch import Layout, Row, WorkerBatch, accumulation_steps, worker_batch
from sft.errors import DataError
from sft.mask import Example
from sft.pack import best_fit

KEPT_STEPS = 8
"""Global batches that stay at hand: workers are at most their prefetch depth apart."""


@dataclass(frozen=True, slots=True)
class FeedPlan:
    """How examples become batches.

    Rule: a training row is an example (padded) or a pack of at most `pack_length` tokens (packed); `global_batch_size`
    and `micro_batch_size` count rows. `epoch_examples` is how many an epoch holds, None where it is not known.
    """

    seed: int
    shuffle_window: int
    global_batch_size: int
    micro_batch_size: int
    layout: Layout
    pad_id: int
    pack_length: int
    epoch_examples: int | None = None


def windows(examples: Iterable[Example], seed: int, epoch: int, window: int) -> Iterator[list[Example]]:
    """Cuts a stream into windows of `window` examples and shuffles each; at most one window is held."""
    stream = iter(examples)
    for number in itertools.count():
        held = list(itertools.islice(stream, window))
        if not held:
            return
        order = np.random.default_rng([seed, epoch, number]).permutation(len(held))
        yield [held[i] for i in order]


class BatchFeed:
    """Serves workers' shares of global batches.

    Args:
        stream: makes the stream of examples of an epoch, from its start and in a fixed order.
        plan: how examples become batches.
    """

    def __init__(self, stream: Callable[[int], Iterable[Example]], plan: FeedPlan) -> None:
        self._stream = stream
        self._plan = plan
        self._batches: Iterator[_GlobalBatch] = iter(())
        self._epoch = -1
        self._next = 0
        self._ended: dict[int, int] = {}
        self._kept: OrderedDict[tuple[int, int], _GlobalBatch] = OrderedDict()

    def share(self, epoch: int, step: int, rank: int, workers: int) -> WorkerBatch | None:
        """One worker's share of one step of one epoch (both counted from 0); None where the epoch has no such step.

        Raises:
            DataError: the epoch has not the examples that were counted: the data changed.
        """
        plan = self._plan
        batch = self._global_batch(epoch, step)
        if batch is None:
            return None
        return worker_batch(
            batch.rows,
            epoch=epoch,
            step=step,
            before=epoch + batch.before,
            after=epoch + batch.after,
            rank=rank,
            workers=workers,
            micro_batch_size=plan.micro_batch_size,
            accumulation=accumulation_steps(plan.global_batch_size, workers, plan.micro_batch_size),
            layout=plan.layout,
            pad_id=plan.pad_id,
        )

    def _global_batch(self, epoch: int, step: int) -> _GlobalBatch | None:
        kept = self._kept.get((epoch, step))
        if kept is not None:
            return kept
        # Workers ask ahead, so one may ask past an epoch's end when another is in the next.
        if step >= self._ended.get(epoch, step + 1):
            return None
        if epoch != self._epoch or step < self._next:
            self._batches = self._cut(epoch)
            self._epoch, self._next = epoch, 0
        for batch in self._batches:
            number = self._next
            self._next += 1
            self._kept[epoch, number] = batch
            if len(self._kept) > KEPT_STEPS:
                self._kept.popitem(last=False)
            if number == step:
                return batch
        self._ended[epoch] = self._next
        return None

    def _cut(self, epoch: int) -> Iterator[_GlobalBatch]:
        """The global batches of an epoch, in order."""
        plan = self._plan
        rows = training_rows(self._stream(epoch), plan, epoch)
        total = plan.epoch_examples
        done = 0
        while batch := list(itertools.islice(rows, plan.global_batch_size)):
            count = done + sum(map(len, batch))
            yield _GlobalBatch(batch, done / total if total else 0.0, count / total if total else 0.0)
            done = count
        if total is not None and done != total:
            raise DataError(
                f"epoch {epoch} has {done} examples, not the {total} that were counted; "
                "keep the files unchanged during a run"
            )


@dataclass(frozen=True, slots=True)
class _GlobalBatch:
    """What one optimizer step sees; `before` and `after` are shares of the epoch, 0 where its size is not known."""

    rows: list[Row]
    before: float
    after: float


def training_rows(examples: Iterable[Example], plan: FeedPlan, epoch: int) -> Iterator[Row]:
    """An epoch's training rows in their order: shuffled within windows, and packed within windows."""
    for number, window in enumerate(windows(examples, plan.seed, epoch, plan.shuffle_window)):
        if plan.layout == "padded":
            yield from ([example] for example in window)
            continue
        packs = best_fit([len(example.input_ids) for example in window], plan.pack_length)
        # Packing sorts by length, so packs are shuffled again.
        for i in np.random.default_rng([plan.seed, epoch, number, 1]).permutation(len(packs)):
            yield [window[j] for j in packs[i]]
