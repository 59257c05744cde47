"""The learning rate as a function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cosine:
    """Linear warm-up, then a cosine from `peak` to `floor` (Loshchilov & Hutter 2017, without restarts)."""

    peak: float
    floor: float
    warmup_steps: int
    total_steps: int

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0. The first warm-up step has 1 / warmup_steps of the peak."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.floor + (self.peak - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
