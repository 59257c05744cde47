from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sft.evaluation import Evaluation, Sample, Score
from sft.loop import StepReport
from sft.report import (
    Reporter,
    clock,
    evaluation_lines,
    evaluation_values,
    metrics_line,
    progress_line,
    step_values,
)

STEP = StepReport(
    step=10,
    total_steps=100,
    epoch=0.5,
    loss=1.25,
    grad_norm=0.5,
    learning_rate=2e-4,
    tokens=4000,
    trained_tokens=1000,
    seconds=2.0,
    data_wait=0.1,
    memory=3 << 29,
    skipped=0,
    rows="00000000000000ff",
)
SAMPLE = Sample("Say\nhi", (5, 6), ended=True)
EVALUATION = Evaluation(10, 0.5, {"one": Score(10.0, 10, 2), "two": Score(60.0, 30, 4)}, (SAMPLE,), 4.0, best=True)


def test_a_line_says_where_the_run_stands() -> None:
    assert progress_line(STEP, [STEP, replace(STEP, seconds=6.0)]) == (
        "step  10/100  epoch 0.50  loss 1.2500  grad 0.50  lr 2.00e-04  250 trained tok/s  1,000 tok/s  "
        "data wait 2%  memory 1.5 GiB  eta 6:00"
    )
    assert progress_line(STEP, [STEP], evaluating=1.0).endswith("  eta 4:30")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (7325, "2:02:05")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_every_step_is_recorded_and_lines_are_few(tmp_path: Path) -> None:
    lines: list[str] = []
    reporter = Reporter(str(tmp_path / "run" / "metrics.jsonl"), lines.append)
    for step in range(1, 101):
        reporter.step(replace(STEP, step=step))
    reporter.close()
    assert [line.split()[1] for line in lines] == ["1/100", "100/100"]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 101))
    assert records[0]["loss"] == 1.25
    assert (reporter.tokens, reporter.trained_tokens, reporter.seconds) == (400_000, 100_000, 200.0)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_steps_that_are_trained_again_are_told_once(tmp_path: Path, scheme: str) -> None:
    path = tmp_path / "metrics.jsonl"
    reporter = Reporter(f"{scheme}{path}", lambda _: None)
    for step in (1, 2, 3, 4, 3, 4, 5):
        reporter.step(replace(STEP, step=step, tokens=10 * step))
    reporter.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]
    assert reporter.tokens == 150


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_run_goes_on_with_the_metrics_of_its_checkpoint(tmp_path: Path, scheme: str) -> None:
    """The driver was killed: of steps 3 to 5 it told no more, and of step 6, which no checkpoint holds, half a line."""
    path = tmp_path / "metrics.jsonl"
    kept = "".join(metrics_line(replace(STEP, step=step, loss=step / 3)) for step in range(1, 6))
    path.write_text("".join(kept.splitlines(keepends=True)[:2]) + '{"step": 6, "lo')
    reporter = Reporter(f"{scheme}{path}", lambda _: None)
    reporter.go_on(kept.encode())
    assert reporter.last == replace(STEP, step=5, loss=5 / 3)
    reporter.step(replace(STEP, step=6))
    reporter.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]
    assert path.read_text().startswith(kept)


def test_a_loss_that_is_no_number_is_null(tmp_path: Path) -> None:
    reporter = Reporter(str(tmp_path / "metrics.jsonl"), lambda _: None)
    bad = replace(STEP, loss=float("nan"), grad_norm=float("inf"), skipped=1)
    reporter.step(bad)
    line = (tmp_path / "metrics.jsonl").read_text()
    assert (json.loads(line)["loss"], json.loads(line)["grad_norm"]) == (None, None)
    reporter.go_on(line.encode())
    assert reporter.last is not None
    assert math.isnan(reporter.last.loss)
    assert reporter.loss(10) is None


def test_an_evaluation_is_told_with_its_largest_sources_and_its_samples() -> None:
    assert evaluation_lines(EVALUATION, ["well\n" * 40]) == [
        "step 10 evaluated  held-out loss 1.7500  perplexity 5.75  (two 2.0000, one 1.0000)  best so far  in 0:04",
        f"step 10 answers 'Say hi' with '{('well ' * 40)[:99]}…'",
    ]
    many = {f"s{n}": Score(float(n), 1, 1) for n in range(8)}
    assert evaluation_lines(replace(EVALUATION, sources=many, samples=()), [])[0].count("and 2 more)") == 1
    assert evaluation_lines(replace(EVALUATION, sources={}, samples=()), []) == []


def test_evaluations_are_recorded_whole_and_counted_in_the_time_left(tmp_path: Path) -> None:
    lines: list[str] = []
    reporter = Reporter(
        str(tmp_path / "metrics.jsonl"),
        lines.append,
        evaluations=str(tmp_path / "evaluations.jsonl"),
        decode=lambda ids: "-".join(map(str, ids)),
    )
    reporter.evaluation(replace(EVALUATION, step=0, best=False))
    reporter.step(replace(STEP, step=1, total_steps=3))
    reporter.evaluation(replace(EVALUATION, step=1, sources={"one": Score(float("nan"), 2, 1)}))
    reporter.step(replace(STEP, step=3, total_steps=3))
    first, second = (json.loads(line) for line in (tmp_path / "evaluations.jsonl").read_text().splitlines())
    assert first["samples"] == [{"prompt": "Say\nhi", "answer": "5-6", "ended": True}]
    assert first["sources"]["one"] == {"total": 10.0, "tokens": 10, "rows": 2, "loss": 1.0, "perplexity": math.e}
    assert (first["loss"], second["loss"], second["perplexity"], second["best"]) == (1.75, None, None, True)
    assert [line.split("  ")[0] for line in lines] == [
        "step 0 evaluated",
        "step 0 answers 'Say hi' with '5-6'",
        "step 1/3",
        "step 1 evaluated",
        "step 1 answers 'Say hi' with '5-6'",
        "step 3/3",
    ]


def test_trackers_get_every_step_and_evaluation() -> None:
    assert step_values(STEP) == {
        "train/loss": 1.25,
        "train/grad_norm": 0.5,
        "train/learning_rate": 2e-4,
        "train/epoch": 0.5,
        "speed/trained_tokens_per_s": 500.0,
        "speed/tokens_per_s": 2000.0,
        "speed/data_wait": 0.05,
        "memory/gib": 1.5,
    }
    values = evaluation_values(EVALUATION)
    assert values.pop("held_out/perplexity") == pytest.approx(5.7546, rel=1e-4)
    assert values == {"held_out/loss": 1.75, "held_out/loss/one": 1.0, "held_out/loss/two": 2.0}
    assert evaluation_values(replace(EVALUATION, sources={})) == {}


def test_a_perplexity_is_a_number_whatever_the_loss() -> None:
    assert Score(0.0, 5, 1).perplexity == 1.0
    largest = Score(1e6, 1, 1).perplexity
    assert largest is not None
    assert math.isfinite(largest)
    assert Score(math.nan, 1, 1).perplexity == math.inf


def test_pairs_have_an_accuracy_in_place_of_a_perplexity() -> None:
    scores = {"one": Score(2.0, 90, 4, right=3), "two": Score(1.0, 30, 1, right=0)}
    made = replace(EVALUATION, sources=scores, samples=())
    assert evaluation_lines(made, [])[0].startswith(
        "step 10 evaluated  held-out loss 0.6000 accuracy 0.600  (one 0.5000 accuracy 0.750, two 1.0000 accuracy 0.000)"
    )
    assert evaluation_values(made) == {
        "held_out/loss": 0.6,
        "held_out/loss/one": 0.5,
        "held_out/loss/two": 1.0,
        "held_out/accuracy": 0.6,
        "held_out/accuracy/one": 0.75,
        "held_out/accuracy/two": 0.0,
    }
    told = made.to_dict([])
    assert (told["accuracy"], told["perplexity"], told["sources"]["one"]["accuracy"]) == (0.6, None, 0.75)


def test_a_stages_figures_are_shown_and_survive_a_restart(tmp_path: Path) -> None:
    figures = {"margin": 0.25, "accuracy": 0.5, "chosen_reward": 0.1, "rejected_reward": -0.15}
    report = replace(STEP, figures=figures)
    assert "  margin 0.250  accuracy 0.500  grad" in progress_line(report, [report])
    assert step_values(report)["train/chosen_reward"] == 0.1
    reporter = Reporter(str(tmp_path / "metrics.jsonl"), lambda _: None)
    reporter.go_on(metrics_line(replace(report, figures={**figures, "margin": math.nan})).encode())
    assert reporter.last is not None
    assert math.isnan(reporter.last.figures["margin"])
    assert reporter.last.figures["accuracy"] == 0.5


def test_an_object_store_gets_the_metrics_whole(tmp_path: Path) -> None:
    reporter = Reporter(f"file://{tmp_path}/metrics.jsonl", lambda _: None)
    reporter.step(STEP)
    reporter.step(replace(STEP, step=11))
    reporter.close()
    assert steps_of(tmp_path / "metrics.jsonl") == [10, 11]
    assert (reporter.loss(10), reporter.loss(12)) == (1.25, None)


def test_an_object_store_keeps_the_evaluations_of_a_run_that_goes_on(tmp_path: Path) -> None:
    for step in (10, 20):
        reporter = Reporter(
            f"file://{tmp_path}/metrics.jsonl", lambda _: None, evaluations=f"file://{tmp_path}/evaluations.jsonl"
        )
        reporter.evaluation(replace(EVALUATION, step=step))
        reporter.close()
    assert steps_of(tmp_path / "evaluations.jsonl") == [10, 20]
