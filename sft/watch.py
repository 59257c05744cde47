"""When a run is evaluated, which step was the best so far, and whether the run should end.

All of it follows from the run's history of held-out losses, which its checkpoints carry; the losses are the same on
every worker, so all decide alike, and a run that goes on decides as if it had never stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sft.batch import WorkerBatch
from sft.evaluate_config import EvaluateSection
from sft.evaluation import Evaluation
from sft.loop import StepReport

Measured = tuple[int, float]
"""Steps done, and the held-out loss after them in nats per trained token."""


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """When to look, and what follows from it.

    Rule: `every_steps` None means before the first step and after the last alone; `patience` None never ends a run.
    """

    every_steps: int | None
    patience: int | None
    min_delta: float
    keep_best: bool


def watch_plan(section: EvaluateSection) -> WatchPlan | None:
    """When a run is looked at; None where nothing is evaluated."""
    if not section.enabled:
        return None
    stopping = section.early_stopping
    return WatchPlan(
        every_steps=section.every_steps,
        patience=stopping.patience if stopping else None,
        min_delta=stopping.min_delta if stopping else 0.0,
        keep_best=section.keep_best,
    )


def best_step(history: Sequence[Measured]) -> int | None:
    """The trained step with the lowest loss, the first of equal ones; None before there is one."""
    trained = [(loss, step) for step, loss in history if step > 0 and math.isfinite(loss)]
    return min(trained)[1] if trained else None


def is_exhausted(history: Sequence[Measured], patience: int, min_delta: float) -> bool:
    """Whether the last `patience` evaluations were no better than the best before them, by `min_delta` at least."""
    best, waited = float("inf"), 0
    for _, loss in history:
        if loss < best - min_delta:
            best, waited = loss, 0
        else:
            waited += 1
    return waited >= patience


class Watch:
    """Looks after a run, step by step. All workers must call it together.

    Args:
        plan: when to look.
        evaluate: evaluates the model after so many steps and epochs.
        tell: takes every evaluation.
        keep: keeps the weights after the step of a batch, with the history, as the best so far.
        history: of the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        plan: WatchPlan,
        evaluate: Callable[[int, float], Evaluation],
        *,
        tell: Callable[[Evaluation], None],
        keep: Callable[[WorkerBatch, StepReport, tuple[Measured, ...]], None],
        history: Sequence[Measured] = (),
    ) -> None:
        self._plan = plan
        self._evaluate = evaluate
        self._tell = tell
        self._keep = keep
        self._history = list(history)

    @property
    def history(self) -> tuple[Measured, ...]:
        """Every held-out loss so far."""
        return tuple(self._history)

    @property
    def stopped(self) -> bool:
        """Whether the run has got no better for too long."""
        plan = self._plan
        return plan.patience is not None and is_exhausted(self._history, plan.patience, plan.min_delta)

    def before(self) -> None:
        """Looks at the model before the first step."""
        self._look(0, 0.0)

    def after(self, batch: WorkerBatch, report: StepReport, last: bool) -> bool:
        """Looks after a step where it is due; returns whether the run ends with it."""
        due = self._plan.every_steps is not None and report.step % self._plan.every_steps == 0
        if not (due or last):
            return False
        if self._look(report.step, report.epoch) and self._plan.keep_best:
            self._keep(batch, report, self.history)
        return last or self.stopped

    def _look(self, step: int, epoch: float) -> bool:
        """Evaluates; returns whether these are the best trained weights so far."""
        evaluation = self._evaluate(step, epoch)
        loss = evaluation.loss
        if loss is not None:
            self._history.append((step, loss))
        best = step > 0 and best_step(self._history) == step
        self._tell(replace(evaluation, best=best))
        return best
