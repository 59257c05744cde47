from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sft.batch import collate
from sft.objective import tensors
from tests.sft import steps
from tests.sft.method_steps import METHODS

STAGES = ("stage0-packed", "stage0-padded", "stage1-packed", "stage2-packed", "stage3-packed")
EVALUATED = [(1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
"""Workers and stages that are evaluated while they train."""
RESUMED = ("resumed0to2", "resumed2to3", "resumed3to0", "resumed1to1")


@pytest.fixture(scope="module")
def results(worker_groups: Path) -> Path:
    """Trains with 1 and with 2 workers, in plain processes; see tests/sft/steps.py."""
    return worker_groups


def adapter(results: Path, workers: int, name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = load_file(results / f"{workers}-{name}.safetensors")
    return weights


def told(results: Path, workers: int, name: str) -> dict[str, Any]:
    every: dict[str, Any] = json.loads((results / f"{workers}.json").read_text())
    found: dict[str, Any] = every[name]
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


@pytest.mark.parametrize(("workers", "stage"), EVALUATED)
def test_a_run_that_is_evaluated_is_the_same_to_the_bit(results: Path, workers: int, stage: int) -> None:
    plain, evaluated = (told(results, workers, name) for name in (f"stage{stage}-packed", f"evaluated{stage}"))
    assert (evaluated["loss"], evaluated["grad_norm"]) == (plain["loss"], plain["grad_norm"])
    one, other = (adapter(results, workers, name) for name in (f"stage{stage}-packed", f"evaluated{stage}"))
    assert all(one[key].equal(other[key]) for key in one)
    assert evaluated["undisturbed"]


@pytest.mark.parametrize(("workers", "stage"), EVALUATED)
def test_a_held_out_loss_does_not_depend_on_workers_or_stage(results: Path, workers: int, stage: int) -> None:
    one, other = told(results, 1, "evaluated0"), told(results, workers, f"evaluated{stage}")
    assert other["sources"] == one["sources"]  # to the bit, for the weights are the same
    assert other["samples"] == one["samples"]
    assert [step for step, _ in other["history"]] == [0, 2, 4]
    assert other["history"] == [pytest.approx(measured, rel=1e-5) for measured in one["history"]]
    assert other["kept"] == one["kept"]


def test_held_out_losses_are_those_of_each_example_alone(results: Path, tiny_model: Path) -> None:
    model = steps.make_model(tiny_model, "float32").eval()
    plan = steps.evaluation_plan()
    with torch.no_grad():
        alone = {
            name: sum(float(model(**tensors(collate([e], "padded", 2), torch.device("cpu")))) for e in rows)
            for name, rows in plan.sources.items()
        }
        answers = []
        for prompt in plan.prompts.values():
            ids = list(prompt)
            for _ in range(plan.max_new_tokens):
                ids.append(int(model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            answers.append(ids[len(prompt) :])
    for name in ("evaluated0", "evaluated-padded"):
        every: dict[str, Any] = json.loads((results / "2.json").read_text())[name]
        sources = every.get("sources", every)
        assert {key: score["total"] for key, score in sources.items()} == pytest.approx(alone, rel=1e-5)
        assert {key: (score["rows"], score["tokens"]) for key, score in sources.items()} == {
            key: (len(rows), sum(row.trained_tokens for row in rows)) for key, rows in plan.sources.items()
        }
    assert told(results, 1, "evaluated0")["samples"] == answers


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
