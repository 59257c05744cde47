from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.sft.method_steps import METHODS

STAGES = ("stage0-packed", "stage0-padded", "stage1-packed", "stage2-packed", "stage3-packed")
RESUMED = ("resumed0to2", "resumed2to3", "resumed3to0", "resumed1to1")


@pytest.fixture(scope="module")
def results(worker_groups: Path) -> Path:
    """Trains with 1 and with 2 workers, in plain processes; see tests/sft/steps.py."""
    return worker_groups


def adapter(results: Path, workers: int, name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(results / f"{workers}-{name}.safetensors")
    return weights


def told(results: Path, workers: int, name: str) -> dict[str, list[float]]:
    every: dict[str, Any] = json.loads((results / f"{workers}.json").read_text())
    found: dict[str, list[float]] = every[name]
    return found


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", STAGES)
def test_loss_and_gradients_do_not_depend_on_workers_stage_or_layout(results: Path, workers: int, name: str) -> None:
    one, other = told(results, 1, "stage0-packed"), told(results, workers, name)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", [*STAGES, *RESUMED])
def test_the_trained_adapter_is_the_same(results: Path, workers: int, name: str) -> None:
    one, other = adapter(results, 1, "stage0-packed"), adapter(results, workers, name)
    assert one.keys() == other.keys()
    assert max(float((one[key] - other[key]).abs().max()) for key in one) < 5e-5  # a step moves a weight by 1e-2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_where_it_stopped_under_another_stage(results: Path, workers: int, name: str) -> None:
    whole, second_half = told(results, 1, "stage0-packed"), told(results, workers, name)
    assert second_half["loss"] == pytest.approx(whole["loss"][2:], rel=1e-5)
    assert second_half["grad_norm"] == pytest.approx(whole["grad_norm"][2:], rel=1e-4)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", ["stage0-bfloat16", "stage3-bfloat16"])
def test_a_bfloat16_base_trains_a_float32_adapter(results: Path, workers: int, name: str) -> None:
    assert {weight.dtype.__str__() for weight in adapter(results, workers, name).values()} == {"torch.float32"}
    assert told(results, workers, name)["loss"] == pytest.approx(told(results, 1, "stage0-packed")["loss"], rel=1e-2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loss_that_is_no_number_stops_every_worker(results: Path, workers: int) -> None:
    message = json.loads((results / f"{workers}.json").read_text())["error"]
    assert message.startswith("the loss of step 1 is nan (epoch 0, its step 0); the last checkpoint is good. ")
    assert "The ids of its rows are in F: " in message


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_the_same_in_one_go_and_in_halves_of_other_workers_and_stages(
    results: Path, method: str
) -> None:
    one, two = told(results, 1, method), told(results, 2, method)
    assert min(one["loss"][1:]) < one["loss"][0]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    whole, halves = adapter(results, 1, method), adapter(results, 2, method)
    assert halves.keys() == whole.keys()
    assert max(float((halves[key] - whole[key]).abs().max()) for key in whole) < 2e-4  # a step moves a weight by 1e-2
