"""One global batch gives one gradient, whoever computes which part of it; see tests/sft/cuts.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.sft.conftest import run_groups
from tests.sft.cuts import STAGES, WORKERS

ROUNDING = 1e-5
"""Allowed error of a gradient, relative to its largest value, in float32."""


def told(folder: Path, workers: int) -> list[dict[str, Any]]:
    """What each worker of a group found."""
    return [json.loads((folder / f"cuts-{workers}-{rank}.json").read_text()) for rank in range(workers)]


@pytest.mark.parametrize("workers", WORKERS)
def test_every_cut_gives_the_gradient_of_the_whole_batch(worker_groups: Path, workers: int) -> None:
    for found in told(worker_groups, workers):
        assert len(found["errors"]) == 16
        assert {name: error for name, error in found["errors"].items() if not error < ROUNDING} == {}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_left_out_leaves_no_trace(worker_groups: Path, stage: int) -> None:
    for found in told(worker_groups, 2):
        bad = found["bad"][str(stage)]
        assert bad["same"]
        infinite, no_number = bad["seen"]
        assert infinite == [2, 8, 4, "inf"]  # step, rows, and those of worker 1, whose loss was infinite
        assert no_number[:3] == [3, 8, 0]


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_all_cuts(tiny_model: Path) -> None:
    folder = run_groups(tiny_model, "all")
    errors = {
        name: error for workers in WORKERS for found in told(folder, workers) for name, error in found["errors"].items()
    }
    assert len(errors) == 3 * 4 * 4 * 4 * 2
    assert {name: error for name, error in errors.items() if not error < ROUNDING} == {}
    print(f"worst of {len(errors)}: {max(errors.items(), key=lambda item: item[1])}")
