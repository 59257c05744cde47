"""What a person and a program see of a run: progress lines and metrics as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import storage
from sft.loop import StepReport

LINE_SECONDS = 3.0
"""Least time between two progress lines."""
WINDOW = 20
"""Steps over which rates are averaged."""


class Reporter:
    """Takes the reports of a run's steps, one after the other, and tells of them.

    A worker group that was restarted trains some steps again; what it says of them takes the place of what was said.

    Args:
        metrics: address of the JSON-lines file; every step is one line.
        say: prints a line.
    """

    def __init__(self, metrics: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._metrics = _MetricsFile(metrics)
        self._steps: list[StepReport] = []
        self._said = float("-inf")

    @property
    def last(self) -> StepReport | None:
        """The newest step."""
        return self._steps[-1] if self._steps else None

    @property
    def tokens(self) -> int:
        """Tokens of all steps of the run."""
        return sum(step.tokens for step in self._steps)

    @property
    def trained_tokens(self) -> int:
        """Trained tokens of all steps of the run."""
        return sum(step.trained_tokens for step in self._steps)

    @property
    def seconds(self) -> float:
        """Seconds of all steps of the run."""
        return sum(step.seconds for step in self._steps)

    def go_on(self, metrics: bytes) -> None:
        """Takes up the metrics that a checkpoint holds, in place of what the file holds."""
        self._steps = [_report(json.loads(line)) for line in metrics.splitlines()]
        self._metrics.rewrite(self._steps)

    def step(self, report: StepReport) -> None:
        """Records a step, and prints a line if one is due."""
        repeated = bool(self._steps) and self._steps[-1].step >= report.step
        while self._steps and self._steps[-1].step >= report.step:
            self._steps.pop()
        self._steps.append(report)
        if repeated:
            self._metrics.rewrite(self._steps)
        else:
            self._metrics.append(report)
        now = time.monotonic()
        if report.step in (1, report.total_steps) or now - self._said >= LINE_SECONDS:
            self._said = now
            self._say(progress_line(report, self._steps[-WINDOW:]))

    def close(self) -> None:
        """Writes what is not yet written."""
        self._metrics.flush()


def progress_line(report: StepReport, recent: list[StepReport]) -> str:
    """One line on one step; rates and the time left are averaged over the recent steps."""
    seconds = max(sum(step.seconds for step in recent), 1e-9)
    wait = sum(step.data_wait for step in recent) / seconds
    left = (report.total_steps - report.step) * seconds / len(recent)
    width = len(str(report.total_steps))
    return "  ".join(
        [
            f"step {report.step:>{width}}/{report.total_steps}",
            f"epoch {report.epoch:.2f}",
            f"loss {report.loss:.4f}",
            f"grad {report.grad_norm:.2f}",
            f"lr {report.learning_rate:.2e}",
            f"{sum(step.trained_tokens for step in recent) / seconds:,.0f} trained tok/s",
            f"{sum(step.tokens for step in recent) / seconds:,.0f} tok/s",
            f"data wait {wait:.0%}",
            f"eta {clock(left)}",
        ]
    )


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def metrics_line(report: StepReport) -> str:
    """A step as a line of JSON; JSON has no NaN and no infinity, so such a number is null."""
    values = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(report).items()
    }
    return json.dumps(values, allow_nan=False) + "\n"


def _report(values: dict[str, Any]) -> StepReport:
    known: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return StepReport(**known)


class _MetricsFile:
    """JSON lines at an address. Object stores cannot append, so there the whole file is written again now and then."""

    REWRITE_SECONDS = 30.0

    def __init__(self, address: str) -> None:
        self._address = address
        self._local = Path(address) if "://" not in address else None
        self._lines: list[str] = []
        self._written = time.monotonic()

    def append(self, report: StepReport) -> None:
        line = metrics_line(report)
        if self._local is not None:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            with self._local.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._written >= self.REWRITE_SECONDS:
            self.flush()

    def rewrite(self, reports: Sequence[StepReport]) -> None:
        """Begins anew with these steps."""
        lines = [metrics_line(report) for report in reports]
        storage.write(self._address, "".join(lines).encode())
        if self._local is None:
            self._lines = lines

    def flush(self) -> None:
        if self._local is None and self._lines:
            storage.write(self._address, "".join(self._lines).encode())
            self._written = time.monotonic()
