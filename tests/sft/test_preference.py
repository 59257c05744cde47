"""DPO against the published formula, against TRL, and against itself cut otherwise; see tests/sft/preference_steps.py.

TRL's numbers are those of its 1.16.0: `DPOTrainer` on the same base, start and pairs, beta 0.2, three steps of AdamW at
2e-3 on all four pairs at once.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sft import loss
from sft.batch import collate
from sft.errors import AdapterError, ModelError
from sft.mask import Example
from sft.model import LoraPlan, build_model, peft_config, trained_parameters
from sft.objective import tensors
from sft.reference import as_reference
from sft.start import read_start
from tests.bundles import lora_bundle
from tests.sft import preference_steps
from tests.sft.preference_steps import PLAN

FIGURES = ("loss", "norm", "chosen_reward", "rejected_reward", "margin", "accuracy")
TRL = {
    "started": (
        (0.6931472, 1.9897693, 0.0, 0.0, 0.0, 0.0),
        (0.5647180, 1.6942109, 0.0801460, -0.1999977, 0.2801437, 1.0),
        (0.4582133, 1.4381835, 0.1631233, -0.3969658, 0.5600891, 1.0),
    ),
    "fresh": (
        (0.6931472, 1.4227637, 0.0, 0.0, 0.0, 0.0),
        (0.6281105, 1.3188543, 0.0405098, -0.0950245, 0.1355343, 1.0),
        (0.5577365, 1.3228570, 0.0870636, -0.2097591, 0.2968227, 1.0),
    ),
}
RUNS = [(1, 0, "started"), (1, 0, "fresh"), *((2, stage, "started") for stage in range(4)), (2, 3, "fresh")]


def told(folder: Path, workers: int, name: str) -> Any:
    return json.loads((folder / f"preference-{workers}.json").read_text())[name]


@pytest.mark.parametrize(
    ("margin", "smoothing", "wanted"),
    [
        (0.0, 0.0, 0.6931471805599453),
        (0.5, 0.0, 0.4740769841801067),  # -log sigmoid(0.5)
        (-2.0, 0.0, 2.1269280110429727),
        (0.5, 0.1, 0.5240769841801067),  # 0.9 x that + 0.1 x -log sigmoid(-0.5)
        (-2.0, 0.25, 1.6269280110429727),
    ],
)
def test_the_loss_is_that_of_the_paper(margin: float, smoothing: float, wanted: float) -> None:
    made = loss.pair_losses(torch.tensor([margin], dtype=torch.float64), smoothing)
    assert made.item() == pytest.approx(wanted, rel=1e-12)


def test_rows_are_summed_apart() -> None:
    wanted = torch.tensor([[7, -100, 3], [-100, -100, -100], [-100, 5, -100]])
    assert loss.row_sums(torch.tensor([1.0, 2.0, 4.0]), wanted).tolist() == [3.0, 0.0, 4.0]


@pytest.mark.parametrize(("workers", "stage", "start"), RUNS)
def test_steps_are_trls_whatever_the_workers_and_the_stage(
    worker_groups: Path, workers: int, stage: int, start: str
) -> None:
    steps = told(worker_groups, workers, f"{start}-{stage}")
    assert len(steps) == len(TRL[start])
    for found, values in zip(steps, TRL[start], strict=True):
        wanted = dict(zip(FIGURES, values, strict=True))
        assert found["accuracy"] == wanted["accuracy"]
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        assert found["loss"] == pytest.approx(wanted["loss"], abs=2e-5)


@pytest.mark.parametrize(("workers", "before"), [(1, 0), (2, 2)])
def test_a_run_that_goes_on_is_the_run_that_was_left_alone(worker_groups: Path, workers: int, before: int) -> None:
    whole, halves = told(worker_groups, workers, f"started-{before}"), told(worker_groups, workers, "resumed")
    one, other = (
        load_file(worker_groups / f"preference-{workers}-{name}.safetensors")
        for name in (f"started-{before}", "resumed")
    )
    if workers == 1:  # the same cut and stage: to the bit
        assert halves == whole[1:]
        assert all(one[name].equal(other[name]) for name in one)
    for step, wanted in zip(halves, whole[1:], strict=True):
        assert step == pytest.approx(wanted, rel=1e-3, abs=1e-4)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-4  # a step moves a weight by 2e-3


def test_held_out_pairs_have_a_loss_and_an_accuracy_by_source(worker_groups: Path) -> None:
    before = told(worker_groups, 1, "before-0")
    assert [(score["rows"], score["right"]) for score in before.values()] == [(3, 0), (1, 0)]
    assert [score["total"] / score["rows"] for score in before.values()] == pytest.approx([math.log(2)] * 2, abs=1e-6)
    for stage in range(4):
        assert told(worker_groups, 2, f"before-{stage}") == before
        after = told(worker_groups, 2, f"after-{stage}")
        assert [score["right"] for score in after.values()] == [3, 1]
        assert after["one"]["total"] == pytest.approx(told(worker_groups, 1, "after-0")["one"]["total"], abs=1e-3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return preference_steps.pairs(tmp_path_factory.mktemp("pairs"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "eager"},
        {"lora": LoraPlan(4, 8, 0.1, ["q_proj", "lm_head"])},
        {"lora": LoraPlan(4, 8, 0.0, "all-linear", init="pissa")},
        {"lora": LoraPlan(4, 8, 0.0, "all-linear", dora=True)},
    ],
    ids=["plain", "eager", "head", "pissa", "dora"],
)
def test_the_reference_of_a_fresh_adapter_is_the_base(
    tiny_model: Path, pairs: list[Example], changes: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = build_model(replace(PLAN, base=tiny_model, **changes))
    before = {name: (value.requires_grad, value.detach().clone()) for name, value in model.named_parameters()}
    inputs = tensors(collate(pairs, "padded", 2), torch.device("cpu"))
    with torch.no_grad(), as_reference(model):
        base = model(**inputs, by_row=True)
    assert torch.allclose(model.eval()(**inputs, by_row=True), base, atol=1e-4)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1)
    with torch.no_grad(), as_reference(model):
        assert torch.equal(model(**inputs, by_row=True), base)
    moved = model(**inputs, by_row=True)
    assert not torch.allclose(moved, base, rtol=0, atol=1e-3)
    assert moved.sum().item() == pytest.approx(model(**inputs).item(), rel=1e-6)
    assert {name: value.requires_grad for name, value in model.named_parameters()} == {
        name: grad for name, (grad, _) in before.items()
    }


def test_a_start_keeps_its_copy_apart_and_its_files_hold_one_adapter(tiny_model: Path, pairs: list[Example]) -> None:
    plan = replace(PLAN, base=tiny_model)
    torch.manual_seed(0)
    fresh = build_model(plan)
    weights = {name: torch.randn(value.shape) * 0.05 for name, value in trained_parameters(fresh).items()}
    model = build_model(plan, start=weights)
    assert trained_parameters(model).keys() == weights.keys()
    assert peft_config(model) == peft_config(fresh)
    inputs = tensors(collate(pairs, "padded", 2), torch.device("cpu"))
    with torch.no_grad():
        start = model(**inputs, by_row=True)
        assert not torch.allclose(start, fresh(**inputs, by_row=True))
        for parameter in trained_parameters(model).values():
            parameter.add_(0.1)
        with as_reference(model):
            assert torch.equal(model(**inputs, by_row=True), start)
        assert not torch.allclose(model(**inputs, by_row=True), start)
    alone = build_model(replace(plan, reference=False), start=weights)
    assert not any("reference" in name for name, _ in alone.named_parameters())


def test_a_document_of_a_pair_counts_as_it_would_alone(tiny_model: Path, pairs: list[Example]) -> None:
    model = build_model(replace(PLAN, base=tiny_model))
    cpu = torch.device("cpu")
    together = model(**tensors(collate(pairs, "padded", 2), cpu), by_row=True)
    alone = [model(**tensors(collate([one], "padded", 2), cpu)) for pair in pairs for one in pair.documents]
    assert torch.allclose(together, torch.stack(alone), rtol=1e-5)
    assert all(one != other for one, other in pairwise(together.tolist()))


def test_a_start_must_be_of_the_same_base_and_template(tiny_model: Path, tmp_path: Path) -> None:
    bundle = lora_bundle(tmp_path / "one", tiny_model, seed=0, rank=4)
    start = read_start(tmp_path / "one", tiny_model, bundle.template_fingerprint, 0.1)
    assert (start.lora.rank, start.lora.alpha, start.lora.dropout) == (4, 8, 0.1)
    model = build_model(replace(PLAN, base=tiny_model, lora=start.lora), start=start.weights)
    assert all(weight.equal(start.weights[name]) for name, weight in trained_parameters(model).items())
    with pytest.raises(AdapterError, match="another chat template"):
        read_start(tmp_path / "one", tiny_model, "0" * 64, 0.0)
    lora_bundle(tmp_path / "two", tiny_model, seed=0, rank=4, base_fingerprint="e" * 64)
    with pytest.raises(AdapterError, match="another base model"):
        read_start(tmp_path / "two", tiny_model, bundle.template_fingerprint, 0.0)
    with pytest.raises(ModelError, match="other modules or shapes"):
        build_model(replace(PLAN, base=tiny_model), start=start.weights)
