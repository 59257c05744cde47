"""Held-out losses of rows -> loss and perplexity by source and model, and each model against the first, row by row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evals.statistics import Interval, ratio_interval
from sft.section import Section


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A row's cross-entropy under a model: `total` nats over `tokens` trained tokens."""

    source: str
    model: str
    row: str
    total: float
    tokens: int


class ModelLoss(Section):
    """A model on a source: mean cross-entropy per trained token in nats, its exponential, and the difference of the
    loss to the first model's with its 95% interval; below 0 is better. `better` counts rows with a lower loss.
    """

    loss: float
    perplexity: float
    difference: float | None = None
    interval: Interval | None = None
    better: int | None = None


class SourceLoss(Section):
    """A source; every model was given the same rows."""

    rows: int
    tokens: int
    models: dict[str, ModelLoss]


def sum_losses(losses: Iterable[RowLoss]) -> dict[str, SourceLoss]:
    """Sums losses up by source. The first model that occurs is the one that others are compared with.

    Rule: every model has a loss for every row of a source.
    """
    cells: defaultdict[str, defaultdict[str, list[RowLoss]]] = defaultdict(lambda: defaultdict(list))
    for one in losses:
        cells[one.source][one.model].append(one)
    return {source: _source(list(models.items())) for source, models in cells.items()}


def _source(models: Sequence[tuple[str, list[RowLoss]]]) -> SourceLoss:
    first = {one.row: one for one in models[0][1]}
    tokens = [one.tokens for one in first.values()]
    found = {}
    for number, (model, losses) in enumerate(models):
        by_row = {one.row: one.total for one in losses}
        assert by_row.keys() == first.keys()
        loss = math.fsum(by_row.values()) / sum(tokens)
        perplexity = math.exp(min(loss, 700.0))
        if not number:
            found[model] = ModelLoss(loss=loss, perplexity=perplexity)
            continue
        moved = [by_row[row] - one.total for row, one in first.items()]
        found[model] = ModelLoss(
            loss=loss,
            perplexity=perplexity,
            difference=math.fsum(moved) / sum(tokens),
            interval=ratio_interval(moved, tokens),
            better=sum(one < 0 for one in moved),
        )
    return SourceLoss(rows=len(first), tokens=sum(tokens), models=found)
