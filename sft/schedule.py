"""The learning rate as a function of how much of the run is done: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cosine:
    """Linear warm-up, then a cosine from `peak` to `floor` (Loshchilov & Hutter 2017, without restarts)."""

    peak: float
    floor: float
    warmup: float

    def rate(self, before: float, after: float) -> float:
        """Learning rate of a step.

        Args:
            before: share of the run that is done before the step, from 0 to 1.
            after: share that is done with it.
        """
        if after < self.warmup:
            return self.peak * after / self.warmup
        done = (before - self.warmup) / (1 - self.warmup)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(max(done, 0.0), 1.0)))
