"""Records and suites -> a score for every answer that was asked for, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evals.answer import Answer, split
from evals.checker import Score
from evals.errors import CheckError
from evals.records import Key, Record
from evals.suite import Row, Suite, fingerprint

NOT_ASKED = "not_asked"
NO_VERDICT = "no_verdict"


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer that was asked for.

    Rule: either `unscored` is empty and there are an answer and a score in [0, 1], or it is the reason and the score
    is None.
    """

    suite: str
    model: str
    row: str
    sample: int
    unscored: str
    score: float | None
    checkers: Mapping[str, Score]
    answer: Answer | None
    record: Record | None
    detail: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON; the rationale apart."""
        answer = self.answer
        return {
            "suite": self.suite,
            "model": self.model,
            "row": self.row,
            "sample": self.sample,
            "score": self.score,
            "unscored": self.unscored,
            "detail": self.detail,
            "checkers": {name: {"score": of.value, "reason": of.reason} for name, of in self.checkers.items()},
            "answer": answer.answer if answer else None,
            "final": answer.final if answer else None,
            "rationale": answer.rationale if answer else None,
        }


def score_all(
    suites: Sequence[Suite], models: Sequence[str], records: Mapping[Key, Record], thinking: bool | None
) -> Iterator[Scored]:
    """Scores every sample of every row of every suite and model, in that order.

    Args:
        suites: what was asked.
        models: who was asked.
        records: what came back.
        thinking: how it was asked; answers to other requests do not count.
    """
    for suite in suites:
        for model in models:
            for row in suite.rows:
                for sample in range(suite.generation.samples):
                    record = records.get((suite.name, model, row.id, sample))
                    asked = fingerprint(suite.request(row, sample, thinking))
                    current = record if record and record.request == asked else None
                    yield score(suite, model, row, sample, current)


def score(suite: Suite, model: str, row: Row, sample: int, record: Record | None) -> Scored:
    """Scores one answer; `record` is None where nothing was asked."""
    if record is None or record.failure:
        reason = record.failure if record else NOT_ASKED
        detail = record.detail if record else ""
        return Scored(suite.name, model, row.id, sample, reason, None, {}, None, record, detail)
    answer = split(record.text, record.reasoning)
    found: dict[str, Score] = {}
    try:
        for name, checker in row.checkers.items():
            found[name] = checker.check(answer, row.reference)
    except CheckError as error:
        detail = f"checker {name}: {error}"
        return Scored(suite.name, model, row.id, sample, NO_VERDICT, None, found, answer, record, detail)
    return Scored(suite.name, model, row.id, sample, "", _whole(suite.score, found), found, answer, record)


def _whole(way: str, scores: Mapping[str, Score]) -> float:
    values = [score.value for score in scores.values()]
    if way == "all":
        return min(values)
    return fmean(values) if way == "mean" else scores[way].value
