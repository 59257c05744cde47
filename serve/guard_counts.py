"""What a guard counts of live answers: requests, failures, times and checked answers. Numbers only, no text. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

STEP = 1.05
"""Times are counted in classes that grow by this: a p95 is at most 5% too high, and a version takes little memory."""
SHORTEST_S = 1e-3


@dataclass(frozen=True, slots=True)
class Counts:
    """What became of a version's requests in some time.

    `first_tokens` and `totals` have how many answers that did not fail fell into each class of times (`class_of`), the
    first of streams only. `checks` has, by checker, how many answers were scored and the sum of their scores.
    """

    requests: int = 0
    failures: int = 0
    first_tokens: Mapping[int, int] = field(default_factory=dict)
    totals: Mapping[int, int] = field(default_factory=dict)
    checks: Mapping[str, tuple[int, float]] = field(default_factory=dict)

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        names = sorted({*self.checks, *other.checks})
        pairs = {name: (self.checks.get(name, (0, 0.0)), other.checks.get(name, (0, 0.0))) for name in names}
        return Counts(
            self.requests + other.requests,
            self.failures + other.failures,
            dict(Counter(self.first_tokens) + Counter(other.first_tokens)),
            dict(Counter(self.totals) + Counter(other.totals)),
            {name: (left[0] + right[0], left[1] + right[1]) for name, (left, right) in pairs.items()},
        )


class Tally:
    """Counts as they come, of the last one or two windows: what is older than that is forgotten."""

    def __init__(self) -> None:
        self._older = Counts()
        self._start()

    def answered(self, first_token_s: float | None, total_s: float) -> None:
        """Counts a request that was answered; a stream has a time to its first token."""
        self._requests += 1
        self._totals[class_of(total_s)] += 1
        if first_token_s is not None:
            self._first_tokens[class_of(first_token_s)] += 1

    def failed(self) -> None:
        """Counts a request that failed by no fault of its client."""
        self._requests += 1
        self._failures += 1

    def checked(self, checker: str, score: float) -> None:
        """Counts an answer that a checker scored, in [0, 1]."""
        count, total = self._checks.get(checker, (0, 0.0))
        self._checks[checker] = (count + 1, total + score)

    def rotate(self) -> None:
        """Begins the next window; what was before the present one is forgotten."""
        self._older = self._current()
        self._start()

    def counts(self) -> Counts:
        """All that is not forgotten, frozen."""
        return self._older.plus(self._current())

    def _start(self) -> None:
        self._requests = self._failures = 0
        self._first_tokens: Counter[int] = Counter()
        self._totals: Counter[int] = Counter()
        self._checks: dict[str, tuple[int, float]] = {}

    def _current(self) -> Counts:
        times = dict(self._first_tokens), dict(self._totals)
        return Counts(self._requests, self._failures, *times, dict(self._checks))


def class_of(seconds: float) -> int:
    """The class of a time; all up to a millisecond are of class 0."""
    return max(0, math.ceil(math.log(max(seconds, SHORTEST_S) / SHORTEST_S, STEP)))


def p95(classes: Mapping[int, int]) -> float | None:
    """The 95th percentile of times, in seconds, as the upper end of its class; None where there are no times."""
    left = math.ceil(0.95 * sum(classes.values()))
    for place, count in sorted(classes.items()):
        left -= count
        if left <= 0:
            return SHORTEST_S * STEP**place
    return None
