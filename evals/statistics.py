"""How sure a mean or a difference is: bootstrap intervals over rows, and McNemar's exact test.

Rows are what is drawn: a row's samples are averaged first, and a pair is the same row asked of two models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DRAWS = 10_000
LEVEL = 0.95
SEED = 20_240_229
CHUNK = 2_000_000
"""Numbers drawn at once, to bound memory."""

Interval = tuple[float, float]


def mean_interval(scores: Sequence[float]) -> Interval:
    """A 95% interval of the mean of scores in [0, 1]."""
    return bootstrap(scores, (0.0, 1.0))


def difference_interval(base: Sequence[float], tuned: Sequence[float]) -> Interval:
    """A 95% interval of the mean of tuned - base over the same rows, whose scores are in [0, 1]."""
    return bootstrap([after - before for before, after in zip(base, tuned, strict=True)], (-1.0, 1.0))


def bootstrap(values: Sequence[float], ends: Interval) -> Interval:
    """A percentile bootstrap interval of a mean; the same values give the same interval.

    Two made-up values, the least and the greatest that there can be, are drawn from as well. Otherwise twenty right
    answers of twenty would give an interval of no width; with them it is close to the score interval of a share.

    Args:
        values: at least one.
        ends: the least and the greatest value that there can be.
    """
    known = np.asarray([*values, *ends], np.float64)
    draw = np.random.default_rng(SEED)
    size = len(known)
    step = max(1, CHUNK // size)
    means = [
        known[draw.integers(0, size, (min(step, DRAWS - begun), size))].mean(axis=1) for begun in range(0, DRAWS, step)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def crossed_bootstrap(values: Sequence[Sequence[float]], ends: Interval) -> Interval:
    """An interval of a mean over runs and rows, both of them drawn: the pigeonhole bootstrap (doi 10.1214/07-AOAS122).

    Every run answered the same rows, so neither a row's values nor a run's are independent of each other. Each draw
    takes runs with replacement and, apart from that, rows with replacement; a value counts as often as its run times
    its row. The two made-up rows of `bootstrap` are drawn from as well, the same for every run.

    Args:
        values: runs x rows; at least one of each, and all runs of the same rows.
        ends: the least and the greatest value that there can be.
    """
    known = np.asarray([[*run, *ends] for run in values], np.float64)
    runs, rows = known.shape
    draw = np.random.default_rng(SEED)
    means = []
    for begun in range(0, DRAWS, step := max(1, CHUNK // rows)):
        size = min(step, DRAWS - begun)
        of_runs = draw.multinomial(runs, np.full(runs, 1 / runs), size)
        of_rows = draw.multinomial(rows, np.full(rows, 1 / rows), size)
        means.append((of_runs @ known * of_rows).sum(axis=1) / (runs * rows))
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def ratio_interval(totals: Sequence[float], weights: Sequence[float]) -> Interval:
    """A percentile bootstrap interval, over rows, of sum(totals) / sum(weights); nothing bounds it, so no rows are
    made up, and few rows give too narrow an interval.

    Args:
        totals: of each row; at least one.
        weights: of each row, above 0.
    """
    known = np.asarray([totals, weights], np.float64)
    size = known.shape[1]
    draw = np.random.default_rng(SEED)
    ratios = []
    for begun in range(0, DRAWS, step := max(1, CHUNK // size)):
        counts = draw.multinomial(size, np.full(size, 1 / size), min(step, DRAWS - begun))
        summed = counts @ known.T
        ratios.append(summed[:, 0] / summed[:, 1])
    low, high = np.quantile(np.concatenate(ratios), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def is_binary(scores: Sequence[float]) -> bool:
    """Whether all scores are 0 or 1."""
    return all(score in (0, 1) for score in scores)


def mcnemar(base: Sequence[float], tuned: Sequence[float]) -> float:
    """The exact two-sided p of McNemar's test on scores of 0 and 1 for the same rows.

    It is the chance that a fair coin splits the rows which changed side at least as unevenly.
    """
    better = sum(after > before for before, after in zip(base, tuned, strict=True))
    worse = sum(after < before for before, after in zip(base, tuned, strict=True))
    changed = better + worse
    term = total = 1
    for k in range(1, min(better, worse) + 1):
        term = term * (changed - k + 1) // k  # whole numbers: exact for any number of rows
        total += term
    shift = max(0, total.bit_length() - 64)
    return min(1.0, math.ldexp(total >> shift, shift + 1 - changed))
