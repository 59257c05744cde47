from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft import storage
from sft.batch import WorkerBatch
from sft.best import best_address, fetch_best, put_best, remove_former
from sft.checkpoint import MANIFEST, Fingerprints, RunState
from sft.errors import CheckpointError
from sft.evaluate_config import EvaluateSection
from sft.evaluation import Evaluation, Score
from sft.loop import StepReport
from sft.watch import Measured, Watch, WatchPlan, best_step, is_exhausted, watch_plan

NAN = float("nan")
BATCH = WorkerBatch(0, 0, (), 0, 0.0, 0, 0.0, 0.0, ())
STATE = RunState(4, 0, 4, 0, Fingerprints("b", "t", "d"), {})


def report(step: int) -> StepReport:
    return StepReport(step, 9, step / 9, 1.0, 0.5, 1e-3, 10, 5, 1.0, 0.1, 1 << 30)


class Run:
    """A run whose held-out losses are given by step."""

    def __init__(self, losses: dict[int, float | None], plan: WatchPlan, history: tuple[Measured, ...] = ()) -> None:
        self.losses = losses
        self.told: list[Evaluation] = []
        self.kept: list[tuple[int, tuple[Measured, ...]]] = []
        self.watch = Watch(plan, self.evaluate, tell=self.told.append, keep=self.keep, history=history)

    def evaluate(self, step: int, epoch: float) -> Evaluation:
        loss = self.losses[step]
        return Evaluation(step, epoch, {} if loss is None else {"s": Score(loss * 4, 4, 2)}, (), 1.0)

    def keep(self, _: WorkerBatch, done: StepReport, history: tuple[Measured, ...]) -> None:
        self.kept.append((done.step, history))

    def go(self, first: int, last: int) -> int:
        """Runs the steps; returns the one that the run ended with."""
        for step in range(first, last + 1):
            if self.watch.after(BATCH, report(step), step == last):
                return step
        raise AssertionError("a run ends")


def test_a_run_is_looked_at_before_it_every_so_often_and_at_its_end() -> None:
    run = Run({0: 3.0, 2: 2.0, 4: 2.5, 5: 1.5}, WatchPlan(2, None, 0.0, keep_best=True))
    run.watch.before()
    assert run.go(1, 5) == 5
    assert [(told.step, told.best) for told in run.told] == [(0, False), (2, True), (4, False), (5, True)]
    assert run.watch.history == ((0, 3.0), (2, 2.0), (4, 2.5), (5, 1.5))
    assert run.kept == [(2, ((0, 3.0), (2, 2.0))), (5, run.watch.history)]


def test_a_run_that_gets_no_better_ends_and_stays_ended() -> None:
    losses: dict[int, float | None] = {0: 3.0, 1: 2.0, 2: 1.95, 3: 2.1, 4: 1.0}
    plan = WatchPlan(1, 2, 0.1, keep_best=True)
    run = Run(losses, plan)
    run.watch.before()
    assert not run.watch.stopped
    assert run.go(1, 4) == 3
    assert [step for step, _ in run.kept] == [1, 2]
    assert Run(losses, plan, run.watch.history).watch.stopped
    gone_on = Run(losses, plan, run.watch.history[:2])
    assert gone_on.go(2, 4) == 3
    assert gone_on.watch.history == run.watch.history


def test_prompts_alone_keep_nothing_and_stop_nothing() -> None:
    run = Run({0: None, 1: None, 2: None}, WatchPlan(1, None, 0.0, keep_best=True))
    run.watch.before()
    assert (run.go(1, 2), run.kept, run.watch.history) == (2, [], ())


@pytest.mark.parametrize(
    ("history", "step"),
    [
        ((), None),
        (((0, 1.0),), None),
        (((0, 1.0), (2, 3.0), (4, 2.0)), 4),
        (((2, 2.0), (4, 2.0)), 2),
        (((2, NAN), (4, 5.0)), 4),
    ],
)
def test_the_best_step_is_the_first_trained_one_with_the_lowest_loss(
    history: tuple[Measured, ...], step: int | None
) -> None:
    assert best_step(history) == step


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 4))
def test_a_run_is_exhausted_when_its_best_loss_is_that_long_ago(losses: list[int], patience: int) -> None:
    history = [(step, float(loss)) for step, loss in enumerate(losses)]
    ago = len(losses) - 1 - losses.index(min(losses)) if losses else 0
    assert is_exhausted(history, patience, 0.0) == (ago >= patience)


@pytest.mark.parametrize(("losses", "exhausted"), [([NAN, NAN], True), ([NAN, 1.0], False), ([1.0, NAN, NAN], True)])
def test_a_loss_that_is_no_number_is_no_better(losses: list[float], exhausted: bool) -> None:
    assert is_exhausted(list(enumerate(losses)), 2, 0.0) is exhausted


def test_the_plan_follows_the_config() -> None:
    assert watch_plan(EvaluateSection()) is None
    section = EvaluateSection.model_validate(
        {"share": 0.1, "every_steps": 5, "early_stopping": {"patience": 2, "min_delta": 0.01}, "keep_best": False}
    )
    assert watch_plan(section) == WatchPlan(5, 2, 0.01, keep_best=False)


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_the_best_checkpoint_lies_in_a_folder_of_its_own_until_a_better_one_is_safe(
    tmp_path: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.best.verify_checkpoint", lambda folder: folder)
    run = f"{scheme}{tmp_path}/run"
    storage.write(f"{run}/checkpoint-1/{MANIFEST}", b"ordinary")
    for step in (2, 4):
        made = tmp_path / f"made{step}"
        made.mkdir()
        (made / MANIFEST).write_text(f"{step}")
        put_best(made, run, step)
    at = [replace(STATE, history=((2, 2.0), (4, 1.0))[:count]) for count in (1, 2)]
    remove_former(run, STATE)  # nothing was measured
    assert (fetch_best(run, at[0]) / MANIFEST).read_text() == "2"
    assert (fetch_best(run, at[1]) / MANIFEST).read_text() == "4"
    remove_former(run, at[1])
    assert storage.folders(run) == ["best-00000004", "checkpoint-1"]
    assert best_address(run, 4) == f"{run}/best-00000004"
    with pytest.raises(CheckpointError, match="no held-out loss was measured"):
        fetch_best(run, STATE)
