from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from sft.loop import StepReport
from sft.report import Reporter, clock, metrics_line, progress_line

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
    skipped=0,
    rows="00000000000000ff",
)


def test_a_line_says_where_the_run_stands() -> None:
    assert progress_line(STEP, [STEP, replace(STEP, seconds=6.0)]) == (
        "step  10/100  epoch 0.50  loss 1.2500  grad 0.50  lr 2.00e-04  250 trained tok/s  1,000 tok/s  "
        "data wait 2%  eta 6:00"
    )


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


def test_an_object_store_gets_the_metrics_whole(tmp_path: Path) -> None:
    reporter = Reporter(f"file://{tmp_path}/metrics.jsonl", lambda _: None)
    reporter.step(STEP)
    reporter.step(replace(STEP, step=11))
    reporter.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
