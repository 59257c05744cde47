"""What a person and a program see of a run while it trains: progress lines, and metrics as JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sft import storage
from sft.evaluation import Evaluation, Score
from sft.loop import StepReport
from sft.trackers import Trackers

LINE_SECONDS = 3.0
"""Least time between two progress lines."""
WINDOW = 20
"""Steps over which rates are averaged."""
SAMPLE_CHARACTERS = 100
"""Characters of a prompt and of an answer in the terminal; the run's folder has them whole."""
SOURCES_SHOWN = 6
"""Sources of a held-out loss in the terminal."""
SHOWN_FIGURES = ("margin", "accuracy")
"""What a stage tells beside the loss that a progress line shows; the metrics hold all."""


class Reporter:
    """Takes the reports of a run's steps and evaluations, one after the other, and tells of them.

    A worker group that was restarted trains some steps again; what it says of them takes the place of what was said.

    A worker group that was restarted trains some steps again; what it says of them takes the place of what was said.

    Args:
        metrics: address of the JSON-lines file; every step is one line.
        say: prints a line.
        evaluations: address of the JSON-lines file of evaluations; of a step that is in it twice the last line holds.
        decode: makes a text of a sample's ids.
        trackers: told of every step and evaluation, too.
    """

    def __init__(
        self,
        metrics: str,
        say: Callable[[str], None],
        *,
        evaluations: str | None = None,
        decode: Callable[[Sequence[int]], str] = str,
        trackers: Trackers | None = None,
    ) -> None:
        self._say = say
        self._metrics = _JsonLines(metrics)
        self._evaluations = _JsonLines(evaluations) if evaluations else None
        self._decode = decode
        self._trackers = trackers or Trackers(())
        self._steps: list[StepReport] = []
        self._said = float("-inf")
        self._evaluating = 0.0
        self._reported = 0

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

    def loss(self, step: int) -> float | None:
        """The training loss of a step; None where it was not reported or is no finite number."""
        found = next((report.loss for report in reversed(self._steps) if report.step == step), math.nan)
        return found if math.isfinite(found) else None

    def go_on(self, metrics: bytes) -> None:
        """Takes up the metrics that a checkpoint holds, in place of what the file holds."""
        self._steps = [_report(json.loads(line)) for line in metrics.splitlines()]
        self._metrics.rewrite([asdict(step) for step in self._steps])

    def step(self, report: StepReport) -> None:
        """Records a step, and prints a line if one is due."""
        repeated = bool(self._steps) and self._steps[-1].step >= report.step
        while self._steps and self._steps[-1].step >= report.step:
            self._steps.pop()
        self._steps.append(report)
        self._reported += 1
        if repeated:
            self._metrics.rewrite([asdict(step) for step in self._steps])
        else:
            self._metrics.append(asdict(report))
        self._trackers.log(report.step, step_values(report))
        now = time.monotonic()
        if report.step in (1, report.total_steps) or now - self._said >= LINE_SECONDS:
            self._said = now
            self._say(progress_line(report, self._steps[-WINDOW:], self._evaluating / self._reported))

    def evaluation(self, evaluation: Evaluation) -> None:
        """Records an evaluation, and prints lines on it."""
        answers = [self._decode(sample.ids) for sample in evaluation.samples]
        if evaluation.step:
            self._evaluating += evaluation.seconds
        if self._evaluations is not None:
            self._evaluations.append(evaluation.to_dict(answers))
        self._trackers.log(evaluation.step, evaluation_values(evaluation))
        for line in evaluation_lines(evaluation, answers):
            self._say(line)

    def close(self) -> None:
        """Writes what is not yet written."""
        self._metrics.flush()
        if self._evaluations is not None:
            self._evaluations.flush()


def progress_line(report: StepReport, recent: list[StepReport], evaluating: float = 0.0) -> str:
    """One line on one step; rates and the time left are averaged over the recent steps.

    Args:
        report: the step.
        recent: it and those before.
        evaluating: seconds of evaluation for each step, which the time left holds as well.
    """
    seconds = max(sum(step.seconds for step in recent), 1e-9)
    wait = sum(step.data_wait for step in recent) / seconds
    left = (report.total_steps - report.step) * (seconds / len(recent) + evaluating)
    width = len(str(report.total_steps))
    return "  ".join(
        [
            f"step {report.step:>{width}}/{report.total_steps}",
            f"epoch {report.epoch:.2f}",
            f"loss {report.loss:.4f}",
            *(f"{name} {report.figures[name]:.3f}" for name in SHOWN_FIGURES if name in report.figures),
            f"grad {report.grad_norm:.2f}",
            f"lr {report.learning_rate:.2e}",
            f"{sum(step.trained_tokens for step in recent) / seconds:,.0f} trained tok/s",
            f"{sum(step.tokens for step in recent) / seconds:,.0f} tok/s",
            f"data wait {wait:.0%}",
            f"memory {report.memory / (1 << 30):.1f} GiB",
            f"eta {clock(left)}",
        ]
    )


def evaluation_lines(evaluation: Evaluation, answers: Sequence[str]) -> list[str]:
    """Lines on one evaluation: the held-out loss with the largest sources', then each sample, cut short."""
    lines = []
    total = evaluation.total
    if total is not None:
        shown = sorted(evaluation.sources.items(), key=lambda named: -named[1].tokens)[:SOURCES_SHOWN]
        more = len(evaluation.sources) - len(shown)
        by_source = ", ".join(f"{name} {_scored(score)}" for name, score in shown)
        lines.append(
            f"step {evaluation.step} evaluated  held-out loss {_scored(total)}"
            + (f"  perplexity {total.perplexity:.2f}" if total.perplexity is not None else "")
            + (f"  ({by_source}{f' and {more} more' if more else ''})" if len(evaluation.sources) > 1 else "")
            + ("  best so far" if evaluation.best else "")
            + f"  in {clock(evaluation.seconds)}"
        )
    lines += [
        f"step {evaluation.step} answers {_short(sample.prompt)!r} with {_short(answer)!r}"
        for sample, answer in zip(evaluation.samples, answers, strict=True)
    ]
    return lines


def _scored(score: Score) -> str:
    """A loss, with the share of pairs that are ranked rightly where the rows are pairs."""
    return f"{score.loss:.4f}" + (f" accuracy {score.accuracy:.3f}" if score.accuracy is not None else "")


def step_values(report: StepReport) -> dict[str, float]:
    """A step's figures under the names that trackers show."""
    seconds = max(report.seconds, 1e-9)
    return {
        "train/loss": report.loss,
        "train/grad_norm": report.grad_norm,
        "train/learning_rate": report.learning_rate,
        "train/epoch": report.epoch,
        "speed/trained_tokens_per_s": report.trained_tokens / seconds,
        "speed/tokens_per_s": report.tokens / seconds,
        "speed/data_wait": report.data_wait / seconds,
        "memory/gib": report.memory / (1 << 30),
        **{f"train/{name}": value for name, value in report.figures.items()},
    }


def evaluation_values(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation's figures under the names that trackers show."""
    total = evaluation.total
    if total is None:
        return {}
    named = {"": total, **{f"/{name}": score for name, score in evaluation.sources.items()}}
    values = {f"held_out/loss{name}": score.loss for name, score in named.items()}
    if total.perplexity is not None:
        values["held_out/perplexity"] = total.perplexity
    ranked = {name: score.accuracy for name, score in named.items() if score.accuracy is not None}
    return values | {f"held_out/accuracy{name}": accuracy for name, accuracy in ranked.items()}


def clock(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss below an hour."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def metrics_line(report: StepReport) -> str:
    """A step as a line of JSON."""
    return json_line(asdict(report))


def _report(values: dict[str, Any]) -> StepReport:
    figures = {key: math.nan if value is None else value for key, value in values.pop("figures", {}).items()}
    known: dict[str, Any] = {key: math.nan if value is None else value for key, value in values.items()}
    return StepReport(**known, figures=figures)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SAMPLE_CHARACTERS else line[: SAMPLE_CHARACTERS - 1] + "…"


def json_line(values: Mapping[str, Any]) -> str:
    """Values as a line of JSON; JSON has no NaN and no infinity, so such a number is null."""
    return json.dumps(_finite(values), allow_nan=False, ensure_ascii=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class _JsonLines:
    """JSON lines at an address. Object stores cannot append, so there the whole file is written again now and then."""

    REWRITE_SECONDS = 30.0

    def __init__(self, address: str) -> None:
        self._address = address
        self._local = Path(address) if "://" not in address else None
        self._lines: list[str] = []
        self._written = time.monotonic()
        if self._local is None:
            before = storage.read(address) or b""
            self._lines = before.decode("utf-8", "replace").splitlines(keepends=True)

    def append(self, record: Mapping[str, Any]) -> None:
        line = json_line(record)
        if self._local is not None:
            self._local.parent.mkdir(parents=True, exist_ok=True)
            with self._local.open("a", encoding="utf-8", errors="replace") as file:
                file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._written >= self.REWRITE_SECONDS:
            self.flush()

    def rewrite(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Begins anew with these records."""
        lines = [json_line(record) for record in records]
        storage.write(self._address, "".join(lines).encode("utf-8", "replace"))
        if self._local is None:
            self._lines = lines

    def flush(self) -> None:
        if self._local is None and self._lines:
            storage.write(self._address, "".join(self._lines).encode("utf-8", "replace"))
            self._written = time.monotonic()
