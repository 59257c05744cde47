"""A worker's training loop. It knows no Ray: batches come in as an iterator, reports and checkpoints go out as calls,
so a step runs in one plain process as well.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist

from sft import loss
from sft.batch import WorkerBatch
from sft.engine import Engine
from sft.errors import TrainingError
from sft.hardware import peak_memory
from sft.objective import CROSS_ENTROPY, Objective
from sft.schedule import Cosine

SKIPPED_IN_A_ROW = 5
"""Bad steps that may follow each other before the run counts as lost."""


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
    on_bad_loss: Literal["stop", "skip"] = "stop"

    def done(self, epochs: float, steps: int) -> float:
        """Share of the run that is done after so many epochs and steps; 1 at its end."""
        return max(epochs / self.epochs if self.epochs else 0.0, steps / self.max_steps if self.max_steps else 0.0)


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step, over all workers.

    Rule: `loss` is the mean over the global batch, of the cross-entropy per trained token, in nats, or of the pairs'
    losses; `figures` are what the objective tells beside it, means as well. Times are seconds of this
    step on worker 0; `data_wait` is the part of `seconds` spent waiting for the batch; `memory` is the most that worker
    0 has held so far, in bytes. `total_steps` is exact at the end of a run; before it, where packs make it unknown, an
    estimate. `epoch` counts epochs done, such as 1.25. `skipped` counts the steps so far that were left out; such a
    step's loss or gradient norm is no finite number. `rows` is the trace of the rows (`sft.trace`) in hexadecimal
    digits.
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
    skipped: int
    rows: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BadStep:
    """A step whose loss or gradient is no finite number; the same on every worker.

    Rule: `step` counts from 1 over the run, `epoch` and `epoch_step` from 0. `rows` are the ids of the whole global
    batch, `suspects` those of the micro-batches whose own loss is not finite.
    """

    step: int
    epoch: int
    epoch_step: int
    loss: float
    grad_norm: float
    suspects: tuple[str, ...]
    rows: tuple[str, ...]


def run_loop(
    engine: Engine,
    plan: LoopPlan,
    batches: Iterator[WorkerBatch],
    *,
    rank: int,
    start: int,
    skipped: int = 0,
    report: Callable[[StepReport], None],
    save: Callable[[WorkerBatch, StepReport, bool], None],
    bad: Callable[[BadStep], str],
    watch: Callable[[WorkerBatch, StepReport, bool], bool] = lambda *_: False,
    objective: Objective = CROSS_ENTROPY,
) -> None:
    """Trains until the run is done.

    Args:
        engine: the engine, with the state of step `start`.
        plan: what to run.
        batches: this worker's shares, from step `start` on.
        rank: this worker's number.
        start: finished steps.
        skipped: those of them that were left out.
        report: called after every step.
        save: called after the step of a batch when a checkpoint is due, and at the end, which the last argument tells.
        bad: called on every worker for a bad step; says where its rows were written.
        watch: called after every step, before `save`, with whether it is the last by plan; says whether it is the last.
        objective: what is minimised.

    Raises:
        TrainingError: the loss or gradient of a step is not finite; raised on every worker, before a checkpoint.
    """
    in_a_row = 0
    for step in itertools.count(start):
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        torch.manual_seed(_step_seed(plan.seed, step, rank))
        engine.seed_noise(_step_seed(plan.seed, step, 0))
        after = plan.done(batch.after, step + 1)
        rate = plan.schedule.rate(plan.done(batch.before, step), after)
        engine.set_learning_rate(rate)
        losses, totals = _train_step(engine, batch, objective)
        mean, *figures = (total / (batch.weight or 1.0) for total in totals)
        norm = engine.grad_norm() if loss.finite(mean) else mean
        if loss.finite(mean) and loss.finite(norm):
            in_a_row = 0
        else:
            in_a_row += 1
            fault = _gather(engine.workers, batch, step + 1, mean, norm, losses)
            _stop(fault, bad(fault), in_a_row, plan)
            if not loss.finite(mean):
                _leave_out(engine, step - skipped)
            skipped += 1
        done = StepReport(
            step=step + 1,
            total_steps=math.ceil((step + 1) / after - 1e-6),
            epoch=batch.after,
            loss=mean,
            grad_norm=norm,
            learning_rate=rate,
            tokens=batch.tokens,
            trained_tokens=batch.trained_tokens,
            seconds=time.perf_counter() - begin,
            data_wait=waited,
            memory=peak_memory(engine.device),
            skipped=skipped,
            rows=f"{batch.trace:016x}",
            figures=dict(zip(objective.figures, figures, strict=True)),
        )
        report(done)
        last = watch(batch, done, after >= 1) or after >= 1
        if last or (plan.save_every is not None and (step + 1) % plan.save_every == 0):
            save(batch, done, last)
        if last:
            return


def _train_step(engine: Engine, batch: WorkerBatch, objective: Objective) -> tuple[list[float], list[float]]:
    """Runs one global batch and steps the optimizer, unless the loss is not finite.

    Returns:
        The loss sum of each micro-batch, and the total of all over all workers with those of the figures.
    """
    factor = loss.normaliser(batch.weight, engine.workers)
    sums = []
    for number, micro in enumerate(batch.micro_batches, start=1):
        summed, figures = objective(engine, micro)
        engine.backward(summed * factor)
        sums.append(torch.cat([summed.detach()[None], figures]))
        if number < len(batch.micro_batches):
            engine.step()
    each = torch.stack(sums).double()
    totals = each.sum(dim=0)
    if engine.workers > 1:
        dist.all_reduce(totals)
    if loss.finite(totals[0].item()):
        engine.step()
    return each[:, 0].tolist(), totals.tolist()


def _leave_out(engine: Engine, updates: int) -> None:
    """Ends the accumulation window of a step that is left out, after so many steps that were not.

    An infinite loss can have a finite gradient, so the state is put back whatever the optimizer makes of it.
    """
    state = engine.state()
    engine.set_learning_rate(0.0)
    engine.step()
    engine.load_state(state, updates)


def _gather(workers: int, batch: WorkerBatch, step: int, mean: float, norm: float, losses: Sequence[float]) -> BadStep:
    """Puts together what all workers know of a bad step."""
    own = [(ids, loss.finite(found)) for ids, found in zip(batch.row_ids, losses, strict=True)]
    shares = [own]
    if workers > 1:
        shares = [[] for _ in range(workers)]
        dist.all_gather_object(shares, own)
    parts = [part for share in shares for part in share]
    return BadStep(
        step=step,
        epoch=batch.epoch,
        epoch_step=batch.step,
        loss=mean,
        grad_norm=norm,
        suspects=tuple(sorted(row for ids, good in parts if not good for row in ids)),
        rows=tuple(sorted(row for ids, _ in parts for row in ids)),
    )


def _stop(fault: BadStep, where: str, in_a_row: int, plan: LoopPlan) -> None:
    """Ends the run at a bad step, unless it may be skipped."""
    what = f"loss of step {fault.step} is {fault.loss}"
    if loss.finite(fault.loss):
        what = f"gradient of step {fault.step} has the norm {fault.grad_norm}"
    if plan.on_bad_loss == "stop":
        raise TrainingError(
            f"the {what} (epoch {fault.epoch}, its step {fault.epoch_step}); the last checkpoint is good. "
            f"The ids of its rows are in {where}: look at them, lower train.learning_rate, or leave such steps out "
            "with train.on_bad_loss skip"
        )
    if in_a_row >= SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"the {what}, and {in_a_row} steps in a row were bad: this is more than single rows. The last checkpoint "
            f"is good; the ids of the rows are in {where} and its neighbours. Lower train.learning_rate"
        )


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one worker's generator (dropout) in one step."""
    return (seed * 1_000_003 + step) * 65_537 + rank
