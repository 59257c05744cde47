"""Scored answers -> numbers by suite and model, and tuned models against the baseline on the same rows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from pydantic import ValidationError

from evals.errors import EvaluationError
from evals.scoring import Scored
from evals.statistics import Interval, difference_interval, is_binary, mcnemar, mean_interval
from evals.suite import Suite
from sft.section import Section


class Mean(Section):
    """A mean over rows, with its 95% interval; both are None where no row was scored."""

    rows: int
    mean: float | None
    interval: Interval | None


class Paired(Section):
    """A model against another on the rows that both have scores for.

    `difference` is the mean of this model's scores minus the other's. `p` is McNemar's, None where scores are not all
    0 or 1. `better` and `worse` are ids of rows. `prompt_tokens_saved` is how many tokens fewer a prompt has.
    """

    model: str
    suite: str
    rows: int
    difference: float | None
    interval: Interval | None
    p: float | None
    better: list[str]
    worse: list[str]
    prompt_tokens_saved: float | None


class ModelSummary(Section):
    """A model on a suite.

    `asked` and `scored` count answers, the mean is over rows. `unscored` counts the others by reason. `failed` are
    ids of rows with a score below 1. `truncated` answers reached the limit of tokens.
    """

    asked: int
    scored: int
    unscored: dict[str, int]
    score: Mean
    checkers: dict[str, Mean]
    failed: list[str]
    truncated: int
    with_rationale: int
    with_final: int
    prompt_tokens: int
    completion_tokens: int
    uncounted: int
    paired: Paired | None
    across: Paired | None


class SuiteSummary(Section):
    """A suite; its rows, the samples of each, and every model."""

    description: str
    rows: int
    samples: int
    models: dict[str, ModelSummary]


class Summary(Section):
    """An evaluation: the first model is the baseline of all others."""

    baseline: str
    models: list[str]
    thinking: bool | None
    suites: dict[str, SuiteSummary]

    @property
    def complete(self) -> bool:
        """Whether every answer that was asked for has a score."""
        return all(one.asked == one.scored for suite in self.suites.values() for one in suite.models.values())


def summarise(
    suites: Sequence[Suite], models: Sequence[str], scored: Iterable[Scored], thinking: bool | None
) -> Summary:
    """Sums an evaluation up. The first of `models` is the baseline."""
    cells: defaultdict[tuple[str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        cells[one.suite, one.model].append(one)
    baseline = models[0]
    found: dict[str, SuiteSummary] = {}
    for suite in suites:
        others = {}
        for model in models:
            mine = cells[suite.name, model]
            tuned = model != baseline
            paired = compare(mine, cells[suite.name, baseline]) if tuned else None
            across = compare(mine, cells[suite.against, baseline]) if tuned and suite.against else None
            others[model] = _model(mine, paired, across)
        samples = suite.generation.samples
        found[suite.name] = SuiteSummary(
            description=suite.description, rows=len(suite.rows), samples=samples, models=others
        )
    return Summary(baseline=baseline, models=list(models), thinking=thinking, suites=found)


def read_summary(path: Path) -> Summary:
    """Reads a summary that a job wrote.

    Raises:
        EvaluationError: the file is none.
    """
    try:
        return Summary.model_validate_json(path.read_bytes())
    except OSError as error:
        raise EvaluationError(f"{path}: the summary cannot be read ({error.strerror})") from None
    except ValidationError:
        raise EvaluationError(f"{path} is no summary of this version of jobs.evaluate: run it again") from None


def by_row(scored: Iterable[Scored]) -> dict[str, float]:
    """The mean score of each row that has one, by its id."""
    values: defaultdict[str, list[float]] = defaultdict(list)
    for one in scored:
        if one.score is not None:
            values[one.row].append(one.score)
    return {row: fmean(found) for row, found in values.items()}


def compare(tuned: Sequence[Scored], base: Sequence[Scored]) -> Paired | None:
    """One model's answers against another's, row by row; None where there are no others."""
    if not base:
        return None
    after, before = by_row(tuned), by_row(base)
    rows = [row for row in after if row in before]
    left, right = [before[row] for row in rows], [after[row] for row in rows]
    some = bool(rows)
    return Paired(
        model=base[0].model,
        suite=base[0].suite,
        rows=len(rows),
        difference=fmean(right) - fmean(left) if some else None,
        interval=difference_interval(left, right) if some else None,
        p=mcnemar(left, right) if some and is_binary(left) and is_binary(right) else None,
        better=[row for row in rows if after[row] > before[row]],
        worse=[row for row in rows if after[row] < before[row]],
        prompt_tokens_saved=_saved(_prompts(tuned), _prompts(base), rows),
    )


def _model(scored: Sequence[Scored], paired: Paired | None, across: Paired | None) -> ModelSummary:
    rows = by_row(scored)
    counted = [one for one in scored if one.score is not None]
    values: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in counted:
        for name, score in one.checkers.items():
            values[name][one.row].append(score.value)
    records = [one.record for one in scored if one.record and not one.record.failure]
    return ModelSummary(
        asked=len(scored),
        scored=len(counted),
        unscored=dict(Counter(one.unscored for one in scored if one.unscored)),
        score=_mean(list(rows.values())),
        checkers={name: _mean([fmean(found) for found in of.values()]) for name, of in values.items()},
        failed=[row for row, value in rows.items() if value < 1],
        truncated=sum(record.finish_reason == "length" for record in records),
        with_rationale=sum(bool(one.answer and one.answer.rationale) for one in counted),
        with_final=sum(bool(one.answer and one.answer.final is not None) for one in counted),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in records),
        completion_tokens=sum(record.completion_tokens or 0 for record in records),
        uncounted=sum(record.completion_tokens is None for record in records),
        paired=paired,
        across=across,
    )


def _mean(values: Sequence[float]) -> Mean:
    if not values:
        return Mean(rows=0, mean=None, interval=None)
    return Mean(rows=len(values), mean=fmean(values), interval=mean_interval(values))


def _prompts(scored: Iterable[Scored]) -> Mapping[str, int]:
    found = {one.row: one.record.prompt_tokens for one in scored if one.record}
    return {row: tokens for row, tokens in found.items() if tokens is not None}


def _saved(after: Mapping[str, int], before: Mapping[str, int], rows: Sequence[str]) -> float | None:
    both = [row for row in rows if row in after and row in before]
    return fmean(before[row] - after[row] for row in both) if both else None
