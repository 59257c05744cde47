"""The evaluations that a version went through: what was asked, what came out, and whether a gate let it pass. Pure."""

from __future__ import annotations

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serve.versions import Signed, VersionText

DIGEST = r"^[0-9a-f]{64}$"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelScore(_Part):
    """A model on a suite: answers that were asked for and scored, and the mean over rows with its 95% interval."""

    asked: int
    scored: int
    rows: int
    mean: float | None
    interval: tuple[float, float] | None


class SuiteScore(_Part):
    """A suite and both models on it.

    `fingerprint` is of the prompts, the checkers and how they were asked. `difference` is the mean of the version's
    scores minus the baseline's on the rows that both have, with its 95% interval.
    """

    fingerprint: str = Field(pattern=DIGEST)
    version: ModelScore
    baseline: ModelScore
    difference: float | None
    interval: tuple[float, float] | None


class RuleResult(_Part):
    """A rule of the gate: what came of it, and the ids of the rows to look at where it does not hold."""

    rule: str
    passed: bool
    reason: str
    rows: tuple[str, ...] = ()


class Findings(_Part):
    """What an evaluation found. Rule: it passed exactly where every rule of its gate holds.

    `gate` is the gate file's SHA-256; `baseline` what the version was compared with: a version, or the base model's id.
    `software` has the releases that the answers came from, by name.
    """

    gate: str = Field(pattern=DIGEST)
    baseline: str = Field(min_length=1)
    suites: dict[str, SuiteScore] = Field(min_length=1)
    rules: tuple[RuleResult, ...] = Field(min_length=1)
    passed: bool
    software: dict[str, str] = {}

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.passed != all(rule.passed for rule in self.rules):
            raise ValueError("passed does not say what the rules say")
        return self


class Evaluation(Findings, Signed):
    """An evaluation that is kept beside its version. Rule: what it holds never changes."""

    number: int = Field(gt=0)
    version: VersionText
