"""A gate: rules that a model's summary must keep before the model may be promoted. Pure; it fails closed."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from evals.summary import ModelSummary, Paired, Summary
from sft.config import read_config
from sft.section import Section

COMPARISONS = ("at_least", "at_most", "not_worse_by", "better_by")


class Rule(Section):
    """One rule: a suite, a number of it, and exactly one comparison."""

    suite: str = Field(description="Name of a suite.")
    metric: str = Field(
        "score.mean",
        description="Path of a number in the model's summary, such as score.mean, score.interval.0 (its lower end), "
        "checkers.NAME.mean, truncated or paired.p.",
    )
    at_least: float | None = None
    at_most: float | None = None
    not_worse_by: float | None = Field(
        None, ge=0, description="The margin: the whole interval of the difference to the baseline is above -margin."
    )
    better_by: float | None = Field(
        None, ge=0, description="The whole interval of the difference to the baseline is above this."
    )
    rows: int = Field(1, gt=0, description="So many rows must have a score.")

    @model_validator(mode="after")
    def _one_comparison(self) -> Self:
        given = [name for name in COMPARISONS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(COMPARISONS)}, got {len(given)}")
        if given[0] in ("not_worse_by", "better_by") and self.metric != "score.mean":
            raise ValueError(f"{given[0]} compares the suite's score: leave metric out")
        return self

    def __str__(self) -> str:
        name, bound = next((n, getattr(self, n)) for n in COMPARISONS if getattr(self, n) is not None)
        metric = "" if name in ("not_worse_by", "better_by") else f" {self.metric}"
        return f"{self.suite}{metric} {name} {bound:g}"


class Gate(Section):
    """All rules of a gate file."""

    rules: list[Rule] = Field(min_length=1)


@dataclass(frozen=True)
class Finding:
    """What came of a rule: whether it holds, why, and the rows to look at where it does not."""

    rule: Rule
    passed: bool
    reason: str
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether a model passed a gate. Rule: it did where every finding did."""

    model: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether all rules hold."""
        return all(finding.passed for finding in self.findings)

    def lines(self) -> Iterator[str]:
        """The verdict for people: a line a rule, and the rows of those that do not hold."""
        for finding in self.findings:
            yield f"{'passed' if finding.passed else 'FAILED'}  {finding.rule}: {finding.reason}"
            if finding.rows:
                yield f"        rows: {', '.join(finding.rows)}"
        yield f"{self.model} {'passed' if self.passed else 'failed'} the gate"


def read_gate(path: Path) -> Gate:
    """Reads a gate file.

    Raises:
        ConfigError: with all its faults.
    """
    return read_config(Gate, path)


def judge(gate: Gate, summary: Summary, model: str) -> Verdict:
    """Judges a model. A rule about what was not measured, or not measured whole, does not hold."""
    return Verdict(model, tuple(_find(rule, summary, model) for rule in gate.rules))


def _find(rule: Rule, summary: Summary, model: str) -> Finding:
    suite = summary.suites.get(rule.suite)
    if suite is None:
        near = difflib.get_close_matches(rule.suite, summary.suites, n=1)
        hint = f"; did the gate mean {near[0]}?" if near else ""
        return Finding(rule, False, f"suite {rule.suite} was not evaluated{hint}")
    mine = suite.models.get(model)
    if mine is None:
        return Finding(rule, False, f"{model} was not evaluated on it")
    relative = rule.not_worse_by is not None or rule.better_by is not None
    holes = _holes(rule, mine, summary.baseline, suite.models.get(summary.baseline) if relative else None)
    if holes:
        return Finding(rule, False, holes)
    if relative:
        return _relative(rule, mine.paired)
    value = _value(mine.model_dump(), rule.metric)
    if value is None:
        return Finding(rule, False, f"the summary has no number {rule.metric}")
    holds = value >= rule.at_least if rule.at_least is not None else value <= (rule.at_most or 0.0)
    return Finding(rule, holds, f"{rule.metric} is {value:.4g}", () if holds else tuple(mine.failed))


def _holes(rule: Rule, mine: ModelSummary, name: str, baseline: ModelSummary | None) -> str:
    """What was asked and has no score; empty where nothing lacks."""
    if mine.scored < mine.asked:
        return f"only {mine.scored} of {mine.asked} answers were scored{_reasons(mine)}"
    if baseline and baseline.scored < baseline.asked:
        scored = f"{baseline.scored} of {baseline.asked} answers of the baseline {name}"
        return f"only {scored} were scored{_reasons(baseline)}"
    if mine.score.rows < rule.rows:
        return f"{mine.score.rows} rows were scored, and the rule wants {rule.rows}"
    return ""


def _relative(rule: Rule, paired: Paired | None) -> Finding:
    if paired is None or paired.interval is None or paired.difference is None:
        return Finding(rule, False, "there is no baseline to compare with: it is the first of --models")
    low, high = paired.interval
    bound = -rule.not_worse_by if rule.not_worse_by is not None else rule.better_by or 0.0
    reason = f"{paired.difference:+.3f} to {paired.model} on {paired.rows} rows, 95% interval {low:+.3f} to {high:+.3f}"
    return Finding(rule, low > bound, reason, () if low > bound else tuple(paired.worse))


def _reasons(one: ModelSummary) -> str:
    return f" ({', '.join(f'{reason}: {count}' for reason, count in one.unscored.items())})"


def _value(values: Any, path: str) -> float | None:
    """The number at a dotted path; None where there is none."""
    for part in path.split("."):
        if isinstance(values, Mapping):
            values = values.get(part)
        elif isinstance(values, (list, tuple)) and part.isdecimal() and int(part) < len(values):
            values = values[int(part)]
        else:
            return None
    return float(values) if isinstance(values, (int, float)) and not isinstance(values, bool) else None
