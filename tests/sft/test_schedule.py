from __future__ import annotations

import pytest

from sft.schedule import Cosine


def test_warms_up_then_falls_to_the_floor() -> None:
    schedule = Cosine(peak=1.0, floor=0.1, warmup_steps=2, total_steps=6)
    assert [schedule.rate(step) for step in range(7)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447, 0.1], abs=1e-6
    )


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert Cosine(peak=2.0, floor=0.0, warmup_steps=0, total_steps=1).rate(0) == 2.0
