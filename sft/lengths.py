"""How long examples are: quantiles and a histogram that needs no settings."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

BUCKETS: tuple[int, ...] = tuple(bound << power for power in range(18) for bound in (8, 10, 12, 14))
"""Longest length, in tokens, of each bucket of a histogram, four to a doubling: 8, 10, 12, 14, 16, 20, ... The last
takes all that is longer."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long kept rows are, in tokens. `histogram` maps a bucket's bound to its rows, where it has any."""

    p50: int
    p90: int
    p99: int
    longest: int
    histogram: Mapping[int, int]

    @classmethod
    def of(cls, ascending: npt.NDArray[Any]) -> Lengths:
        """Sums up lengths that are sorted already."""
        if not len(ascending):
            return cls(0, 0, 0, 0, {})
        p50, p90, p99 = (int(ascending[-(-len(ascending) * percent // 100) - 1]) for percent in (50, 90, 99))
        below = np.searchsorted(ascending, BUCKETS[:-1], side="right")
        counts = np.diff(below, prepend=0, append=len(ascending)).tolist()
        histogram = {bound: count for bound, count in zip(BUCKETS, counts, strict=True) if count}
        return cls(p50, p90, p99, int(ascending[-1]), histogram)

    def bounds(self, most: int) -> list[int]:
        """Buckets to show, from the first that has rows to the last; joined by twos until there are at most `most`."""
        if not self.histogram:
            return []
        first, last = (BUCKETS.index(pick(self.histogram)) for pick in (min, max))
        step = 1
        while -(-last // step) - -(-first // step) + 1 > most:
            step *= 2
        return [BUCKETS[min(i, len(BUCKETS) - 1)] for i in range(-(-first // step) * step, last + step, step)]

    def counts(self, bounds: Sequence[int]) -> list[int]:
        """Rows in each of the buckets with these bounds."""
        counts = [0] * len(bounds)
        for bound, count in self.histogram.items():
            counts[bisect_left(bounds, bound)] += count
        return counts

    def to_dict(self) -> dict[str, Any]:
        """The lengths as plain values, for JSON, whose keys are text."""
        return {
            "p50": self.p50,
            "p90": self.p90,
            "p99": self.p99,
            "longest": self.longest,
            "histogram": {str(bound): count for bound, count in self.histogram.items()},
        }
