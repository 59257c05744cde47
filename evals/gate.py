"""A gate: rules that a model's summary must keep before the model may be promoted. Pure; it fails closed."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from evals.suite import Suite, read_suites
from evals.summary import ModelSummary, Paired, Summary
from sft.config import read_config
from sft.errors import ConfigError
from sft.section import Section

CURRENT = "current"
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
    """A gate file: all its rules, and what a promotion asks before it judges by them."""

    rules: list[Rule] = Field(min_length=1)
    suites: list[Path] = Field([], description="Suite files, or folders of them; beside the gate file if relative.")
    baseline: str = Field(
        CURRENT,
        min_length=1,
        description="What a version that is to be promoted is compared with: current, which is the version that the "
        "alias serves (the base model where it serves none yet), or a model's name.",
    )


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
    gate = read_config(Gate, path)
    return gate.model_copy(update={"suites": [path.parent / suite for suite in gate.suites]})


def read_gate_suites(gate: Gate, path: Path) -> list[Suite]:
    """Reads the suites that a gate names, and proves that its rules can be judged by them.

    Args:
        gate: what `read_gate` read.
        path: from where, for messages.

    Raises:
        ConfigError: the gate names no suites, or rules about other ones or about more rows than there are.
        SuiteError: with every fault of the suites.
    """
    if not gate.suites:
        raise ConfigError(str(path), ["suites: is missing; name the suite files that the version is asked"])
    suites = {suite.name: suite for suite in read_suites(gate.suites)}
    faults = []
    for index, rule in enumerate(gate.rules):
        suite = suites.get(rule.suite)
        if suite is None:
            faults.append(f"rules.{index}.suite: {rule.suite} is none of its suites, which are {', '.join(suites)}")
        elif rule.rows > len(suite.rows):
            faults.append(f"rules.{index}.rows: {rule.rows} are asked for, and {suite.name} has {len(suite.rows)}")
    if faults:
        raise ConfigError(str(path), faults)
    return list(suites.values())


def suite_digest(suite: Suite) -> str:
    """SHA-256 of all that decides a suite's scores: prompts, references, checkers, and how they are asked."""
    rows = [
        {
            "id": row.id,
            "messages": [dict(message) for message in row.messages],
            "reference": row.reference,
            "checkers": {name: checker.model_dump(mode="json") for name, checker in row.checkers.items()},
        }
        for row in suite.rows
    ]
    whole = {"score": suite.score, "generation": suite.generation.model_dump(mode="json"), "rows": rows}
    return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()


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
        return f"only {mine.scored} of {mine.asked} answers were scored{unscored_reasons(mine)}"
    if baseline and baseline.scored < baseline.asked:
        scored = f"{baseline.scored} of {baseline.asked} answers of the baseline {name}"
        return f"only {scored} were scored{unscored_reasons(baseline)}"
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


def unscored_reasons(one: ModelSummary) -> str:
    """Why answers have no score, in brackets."""
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
