from __future__ import annotations

import pytest

from sft.schedule import Cosine


def test_warms_up_then_falls_to_the_floor() -> None:
    schedule = Cosine(peak=1.0, floor=0.1, warmup=2 / 6)
    assert [schedule.rate(step / 6, (step + 1) / 6) for step in range(7)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.1 + 0.9 * 0.853553, 0.55, 0.1 + 0.9 * 0.146447, 0.1], abs=1e-6
    )


def test_a_step_that_ends_the_warm_up_has_the_peak() -> None:
    assert Cosine(peak=1.0, floor=0.0, warmup=0.1).rate(0.0, 0.25) == 1.0


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert Cosine(peak=2.0, floor=0.0, warmup=0.0).rate(0.0, 1.0) == 2.0
