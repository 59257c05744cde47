"""What a person and a program see of a run: progress lines and metrics as JSON lines."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from sft import storage
from sft.loop import StepReport

LINE_SECONDS = 3.0
"""Least time between two progress lines."""
WINDOW = 20
"""Steps over which rates are averaged."""


class Reporter:
    """Takes the reports of a run's steps, one after the other, and tells of them.

    Args:
        metrics: address of the JSON-lines file; every step is one line.
        say: prints a line.
    """

    def __init__(self, metrics: str, say: Callable[[str], None]) -> None:
        self._say = say
        self._metrics = _MetricsFile(metrics)
        self._recent: deque[StepReport] = deque(maxlen=WINDOW)
        self._said = float("-inf")
        self.last: StepReport | None = None
        self.tokens = 0
        self.trained_tokens = 0
        self.seconds = 0.0

    def step(self, report: StepReport) -> None:
        """Records a step, and prints a line if one is due."""
        self.last = report
        self._recent.append(report)
        self.tokens += report.tokens
        self.trained_tokens += report.trained_tokens
        self.seconds += report.seconds
        self._metrics.append(asdict(report))
        now = time.monotonic()
        if report.step in (1, report.total_steps) or now - self._said >= LINE_SECONDS:
            self._said = now
            self._say(progress_line(report, list(self._recent)))

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


class _MetricsFile:
    """JSON lines at an address. Object stores cannot append, so there the whole file is written again now and then."""

    REWRITE_SECONDS = 30.0

    def __init__(self, address: str) -> None:
        self._address = address
        self._local = Path(address) if "://" not in address else None
        self._lines: list[str] = []
        self._written = time.monotonic()
        if self._local is not None:
            self._local.parent.mkdir(parents=True, exist_ok=True)

    def append(self, record: dict[str, object]) -> None:
        line = json.dumps(record) + "\n"
        if self._local is not None:
            with self._local.open("a", encoding="utf-8") as file:
                file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._written >= self.REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._local is None and self._lines:
            storage.write(self._address, "".join(self._lines).encode())
            self._written = time.monotonic()
