"""A worker's training loop. It knows no Ray: batches come in as an iterator, reports and checkpoints go out as calls,
so a step runs in one plain process as well.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sft import loss
from sft.batch import MicroBatch, WorkerBatch
from sft.engine import Engine
from sft.errors import TrainingError
from sft.hardware import peak_memory
from sft.schedule import Cosine


@dataclass(frozen=True, slots=True)
class LoopPlan:
    """What a loop runs: until when, at which rate, and when it saves.

    Rule: the run ends after `epochs` or after `max_steps`, whichever is first; at least one is given.
    """

    epochs: int | None
    max_steps: int | None
    schedule: Cosine
    seed: int
    save_every: int | None

    def done(self, epochs: float, steps: int) -> float:
        """Share of the run that is done after so many epochs and steps; 1 at its end."""
        return max(epochs / self.epochs if self.epochs else 0.0, steps / self.max_steps if self.max_steps else 0.0)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, over all workers.

    Rule: `loss` is the mean cross-entropy per trained token of the global batch, in nats; times are seconds of this
    step on worker 0; `data_wait` is the part of `seconds` spent waiting for the batch; `memory` is the most that worker
    0 has held so far, in bytes. `total_steps` is exact at the end of a run; before it, where packs make it unknown, an
    estimate. `epoch` counts epochs done, such as 1.25.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    seconds: float
    data_wait: float
    memory: int


def run_loop(
    engine: Engine,
    plan: LoopPlan,
    batches: Iterator[WorkerBatch],
    *,
    rank: int,
    start: int,
    report: Callable[[StepReport], None],
    save: Callable[[WorkerBatch, StepReport], None],
    watch: Callable[[WorkerBatch, StepReport, bool], bool] = lambda *_: False,
) -> None:
    """Trains until the run is done.

    Args:
        engine: the engine, with the state of step `start`.
        plan: what to run.
        batches: this worker's shares, from step `start` on.
        rank: this worker's number.
        start: finished steps.
        report: called after every step.
        save: called after the step of a batch when a checkpoint is due, and at the end.
        watch: called after every step, before `save`, with whether it is the last by plan; it may make it the last.

    Raises:
        TrainingError: the loss of a step is not finite; raised on every worker, before the optimizer steps.
    """
    for step in itertools.count(start):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        torch.manual_seed(_step_seed(plan.seed, step, rank))
        after = plan.done(batch.after, step + 1)
        rate = plan.schedule.rate(plan.done(batch.before, step), after)
        engine.set_learning_rate(rate)
        total = _train_step(engine, batch)
        done = StepReport(
            step=step + 1,
            total_steps=math.ceil((step + 1) / after - 1e-6),
            epoch=batch.after,
            loss=total / (batch.weight or 1.0),
            grad_norm=engine.grad_norm(),
            learning_rate=rate,
            tokens=batch.tokens,
            trained_tokens=batch.trained_tokens,
            seconds=time.perf_counter() - begin,
            data_wait=waited,
            memory=peak_memory(engine.device),
        )
        report(done)
        last = after >= 1
        last = watch(batch, done, last) or last
        if last or (plan.save_every is not None and (step + 1) % plan.save_every == 0):
            save(batch, done)
        if last:
            return


def _train_step(engine: Engine, batch: WorkerBatch) -> float:
    """Runs one global batch and steps the optimizer; returns the cross-entropy sum over all workers."""
    factor = loss.normaliser(batch.weight, engine.workers)
    total = torch.zeros(1, dtype=torch.float64, device=engine.device)
    for number, micro in enumerate(batch.micro_batches, start=1):
        summed = engine.forward(**tensors(micro, engine.device))
        engine.backward(summed * factor)
        total += summed.detach()
        if number == len(batch.micro_batches):
            if engine.workers > 1:
                dist.all_reduce(total)
            if not loss.finite(total.item()):
                raise TrainingError(
                    f"the loss of epoch {batch.epoch}, step {batch.step} is {total.item()}; "
                    "the last checkpoint is good. Lower train.learning_rate, or look at these rows: "
                    f"{', '.join(batch.row_ids[:16])}"
                )
        engine.step()
    return float(total.item())


def tensors(micro: MicroBatch, device: torch.device) -> dict[str, Tensor | None]:
    """A micro-batch as the model's arguments."""
    arrays = {
        "input_ids": micro.input_ids,
        "labels": micro.labels,
        "position_ids": micro.position_ids,
        "attention_mask": micro.attention_mask,
        "weights": micro.weights,
    }
    return {name: None if array is None else torch.tensor(array, device=device) for name, array in arrays.items()}


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one worker's generator (dropout) in one step."""
    return (seed * 1_000_003 + step) * 65_537 + rank
