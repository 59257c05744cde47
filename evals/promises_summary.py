"""Scored answers -> what came of each promise, base against tuned, over all rows and all seeds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from evals.promises import Measure, Promise, Side
from evals.promises_proof import Proof
from evals.scoring import Scored
from evals.statistics import Interval, crossed_bootstrap
from sft.section import Section

ENDS = (-1.0, 1.0)
Place = tuple[int, str]
"""A row: the number of its suite on its side, and its id."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """An adapter's versions, by the seed each was trained with. Rule: there is at least one."""

    adapter: str
    models: Mapping[int, str]


class MeasureResult(Section):
    """What came of a comparison: both means over rows and seeds, and the difference with its 95% interval.

    `by_seed` are the differences seed by seed, where a tuned model takes part. `rows` are those that every model has a
    score for, of `asked`; without any, all numbers are None. `better` and `worse` count rows whose mean over the seeds
    rose or fell. `prompt_tokens_saved` is how many tokens fewer tuned's prompt has where base has another.
    """

    name: str
    says: str
    before: float | None
    after: float | None
    difference: float | None
    interval: Interval | None
    by_seed: dict[int, float]
    rows: int
    asked: int
    better: int
    worse: int
    prompt_tokens_saved: float | None

    @property
    def verdict(self) -> str:
        """What the interval says, in plain words."""
        if self.interval is None:
            return "not measured"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no clear change"


class PromiseResult(Section):
    """What came of a promise: its first measure, whether that keeps it, all measures, and where it was proven that
    nothing leaked, that proof.
    """

    claim: str
    kept: bool
    verdict: str
    adapter: str
    models: dict[int, str]
    base: float | None
    tuned: float | None
    difference: float | None
    interval: Interval | None
    rows: int
    seeds: list[int]
    measures: list[MeasureResult]
    proof: Proof
    data_report: dict[str, Any] | None = None


def promise_result(
    promise: Promise,
    scored: Iterable[Scored],
    base: str,
    tuned: Tuned,
    proof: Proof,
    data_report: dict[str, Any] | None = None,
) -> PromiseResult:
    """Sums a promise up.

    Args:
        promise: what is measured.
        scored: all answers of the base and of the tuned models on its suites.
        base: the base model's name.
        tuned: the tuned models.
        proof: that its suites and the adapter's training data are apart.
        data_report: what the trainer itself says of held-out tasks.
    """
    answers: defaultdict[tuple[str, str], dict[str, Scored]] = defaultdict(dict)
    for one in scored:
        answers[one.model, one.suite][one.row] = one
    measures = [_measure(measure, answers, base, tuned) for measure in promise.measures]
    first = measures[0]
    return PromiseResult(
        claim=promise.claim,
        kept=first.verdict == "better",
        verdict=_sentence(first),
        adapter=promise.adapter,
        models=dict(tuned.models),
        base=first.before,
        tuned=first.after,
        difference=first.difference,
        interval=first.interval,
        rows=first.rows,
        seeds=list(tuned.models),
        measures=measures,
        proof=proof,
        data_report=data_report,
    )


def _measure(
    measure: Measure, answers: Mapping[tuple[str, str], Mapping[str, Scored]], base: str, tuned: Tuned
) -> MeasureResult:
    def side(side: Side, read: Callable[[Scored, str | None], float | None], seed: int) -> dict[Place, float]:
        model = tuned.models[seed] if side.tuned else base
        found = {
            (number, row): read(one, side.checker)
            for number, suite in enumerate(side.suites)
            for row, one in answers.get((model, suite), {}).items()
        }
        return {place: value for place, value in found.items() if value is not None}

    before = [side(measure.before, _value, seed) for seed in tuned.models]
    after = [side(measure.after, _value, seed) for seed in tuned.models]
    asked = {
        (number, row)
        for model in (base, *tuned.models.values())
        for number, suite in enumerate(measure.after.suites)
        for row in answers.get((model, suite), {})
    }
    rows = sorted(set.intersection(*map(set, before), *map(set, after)))
    if not rows:
        return MeasureResult(
            name=measure.name,
            says=measure.says,
            before=None,
            after=None,
            difference=None,
            interval=None,
            by_seed={},
            rows=0,
            asked=len(asked),
            better=0,
            worse=0,
            prompt_tokens_saved=None,
        )
    values = [[new[row] - old[row] for row in rows] for old, new in zip(before, after, strict=True)]
    by_row = [fmean(of) for of in zip(*values, strict=True)]
    left, right = (fmean(one[row] for one in of for row in rows) for of in (before, after))
    # Without a tuned model there is one set of answers, not one for each seed.
    seeded = measure.before.tuned or measure.after.tuned
    return MeasureResult(
        name=measure.name,
        says=measure.says,
        before=left,
        after=right,
        difference=right - left,
        interval=crossed_bootstrap(values if seeded else values[:1], ENDS),
        by_seed={seed: fmean(of) for seed, of in zip(tuned.models, values, strict=True)} if seeded else {},
        rows=len(rows),
        asked=len(asked),
        better=sum(value > 0 for value in by_row),
        worse=sum(value < 0 for value in by_row),
        prompt_tokens_saved=_saved(measure, side, tuned),
    )


def _saved(
    measure: Measure,
    side: Callable[[Side, Callable[[Scored, str | None], float | None], int], dict[Place, float]],
    tuned: Tuned,
) -> float | None:
    """How many tokens fewer a prompt has after than before; None where tuning is not what makes it shorter."""
    if measure.before.suites == measure.after.suites or measure.before.tuned == measure.after.tuned:
        return None
    seed = next(iter(tuned.models))
    before, after = side(measure.before, _prompt_tokens, seed), side(measure.after, _prompt_tokens, seed)
    both = sorted(before.keys() & after.keys())
    return fmean(before[row] - after[row] for row in both) if both else None


def _value(one: Scored, checker: str | None) -> float | None:
    if one.score is None:
        return None
    return one.score if checker is None else one.checkers[checker].value


def _prompt_tokens(one: Scored, _checker: str | None) -> float | None:
    return None if one.record is None else one.record.prompt_tokens


def _sentence(first: MeasureResult) -> str:
    """Whether the promise was kept, in plain words."""
    if first.interval is None or first.difference is None:
        return "Not measured: no row has a score from every model."
    low, high = (f"{100 * end:+.1f}" for end in first.interval)
    moved = f"{100 * first.difference:+.1f} points, 95% interval {low} to {high}"
    return {
        "better": f"Kept: {moved}.",
        "worse": f"Broken: tuned is worse than base, {moved}.",
        "no clear change": f"Not kept: no clear change, {moved}.",
    }[first.verdict]
