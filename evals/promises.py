"""The six promises of instruction tuning, and what is measured of each: adapter, suites, and what is compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HELD_IN, HELD_OUT = "tasks-held-in", "tasks-held-out"
"""Suites of generated tasks: of kinds that are trained, and of clusters of which none is."""


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: the base or the tuned models on some suites; `checker` None is the suite's score.

    Rule: where both sides name other suites, these have the same row ids, in pairs.
    """

    suites: tuple[str, ...]
    tuned: bool = False
    checker: str | None = None


@dataclass(frozen=True, slots=True)
class Measure:
    """A comparison, and what it says: the mean of `after` minus `before` over the same rows."""

    name: str
    says: str
    before: Side
    after: Side


@dataclass(frozen=True, slots=True)
class Promise:
    """A promise. Rule: the first measure decides whether it is kept, the others say what more there is to know."""

    key: str
    claim: str
    adapter: str
    measures: tuple[Measure, ...]

    @property
    def suites(self) -> tuple[str, ...]:
        """All suites that it needs, each once."""
        sides = [side for measure in self.measures for side in (measure.before, measure.after)]
        return tuple(dict.fromkeys(suite for side in sides for suite in side.suites))


def tuned_against_base(name: str, says: str, *suites: str, checker: str | None = None) -> Measure:
    """The usual comparison: tuned and base on the same suites."""
    return Measure(name, says, Side(suites, checker=checker), Side(suites, tuned=True, checker=checker))


PROMISES = (
    Promise(
        "format_control",
        "Keeps a fixed format, whatever is asked.",
        "format",
        (
            tuned_against_base("format", "answers in the format", "format-json", "format-bullets"),
            tuned_against_base("json", "one JSON object with the three given fields", "format-json"),
            tuned_against_base("bullets", "exactly three bullets", "format-bullets"),
        ),
    ),
    Promise(
        "task_specialisation",
        "Does the company's own task.",
        "procedures",
        (
            tuned_against_base("procedure", "names the right procedure", "procedures"),
            tuned_against_base("format", "answers in the procedures' format", "procedures", checker="format"),
            tuned_against_base("cost elsewhere", "still answers general questions", "general"),
        ),
    ),
    Promise(
        "multi_task",
        "Learns many tasks from one mixture.",
        "tasks",
        (
            tuned_against_base("right", "the verifier takes the answer to a task that was trained", HELD_IN),
            tuned_against_base("holds", "the right result occurs in the answer", HELD_IN, checker="holds"),
        ),
    ),
    Promise(
        "zero_shot_transfer",
        "Gets better at kinds of tasks that were never trained.",
        "tasks",
        (
            tuned_against_base("right", "the verifier takes the answer to a task of a held-out cluster", HELD_OUT),
            tuned_against_base("holds", "the right result occurs in the answer", HELD_OUT, checker="holds"),
        ),
    ),
    Promise(
        "chain_of_thought",
        "Reasons step by step when asked to.",
        "steps",
        (
            tuned_against_base("on, strict", "with a rationale: the marked answer is right", "steps-on"),
            tuned_against_base(
                "on, flexible", "with a rationale: the last number is right", "steps-on", checker="flexible"
            ),
            tuned_against_base("off, strict", "without one: the marked answer is right", "steps-off"),
            tuned_against_base(
                "off, flexible", "without one: the last number is right", "steps-off", checker="flexible"
            ),
            Measure(
                "tuned, off to on",
                "what the rationale gives the tuned model, read strictly",
                Side(("steps-off",), tuned=True),
                Side(("steps-on",), tuned=True),
            ),
            Measure(
                "base, off to on",
                "what the rationale gives the base, read flexibly",
                Side(("steps-off",), checker="flexible"),
                Side(("steps-on",), checker="flexible"),
            ),
        ),
    ),
    Promise(
        "prompt_engineering",
        "Needs one line of prompt where the base needs five paragraphs.",
        "procedures",
        (
            Measure(
                "format",
                "answers in the format: tuned on one line, base on five paragraphs",
                Side(("prompt-long",), checker="format"),
                Side(("prompt-short",), tuned=True, checker="format"),
            ),
            Measure(
                "procedure",
                "names the right procedure: tuned on one line, base on five paragraphs",
                Side(("prompt-long",), checker="procedure"),
                Side(("prompt-short",), tuned=True, checker="procedure"),
            ),
            tuned_against_base("one line", "both on one line", "prompt-short", checker="format"),
        ),
    ),
)


def suites_of(adapter: str, promises: Sequence[Promise] = PROMISES) -> tuple[str, ...]:
    """The suites on which an adapter's models and the base are asked, each once."""
    return tuple(dict.fromkeys(suite for one in promises if one.adapter == adapter for suite in one.suites))
