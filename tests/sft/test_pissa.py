from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sft import pissa
from sft.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from sft.errors import ModelError
from sft.lora import check_weights, read_settings
from sft.model import LoraPlan, LossModel, ModelPlan, build_model, peft_config, trained_parameters

PLAN = LoraPlan(4, 8, 0.0, "all-linear", init="pissa")
IDS = torch.arange(3, 15)[None]


def build(base: Path, lora: LoraPlan, dtype: str = "float32") -> LossModel:
    torch.manual_seed(0)
    plan = ModelPlan(base, "tiny", "float32", "none", "sdpa", False, lora)
    return build_model(replace(plan, dtype=dtype))  # type: ignore[arg-type]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        made: Tensor = model.eval()(input_ids=IDS, use_cache=False).logits.float()
    return made


def adapter_folder(model: LossModel, folder: Path) -> Path:
    """The adapter as a checkpoint and a bundle hold it."""
    frozen = pissa.frozen_start(model)
    joined = {name: pissa.joined(name, value, frozen[name]) for name, value in trained_parameters(model).items()}
    save_file({name: value.detach() for name, value in joined.items()}, folder / ADAPTER_WEIGHTS)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(peft_config(model)))
    return folder


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_bundle_is_a_plain_lora_on_the_base_that_everybody_has(
    tiny_model: Path, tmp_path: Path, init: str, rslora: bool
) -> None:
    model = build(tiny_model, replace(PLAN, init=init, rslora=rslora))
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.testing.assert_close(logits(model.model), logits(base), rtol=0, atol=1e-6)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    trained = logits(model.model)
    assert (trained - logits(base)).abs().max() > 1e-2
    folder = adapter_folder(model, tmp_path)
    settings = read_settings(folder)
    assert settings.rank == 8
    check_weights(folder, settings)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder)), trained, rtol=0, atol=1e-5)


def test_it_starts_as_the_largest_singular_directions_and_moves_no_weight_of_the_base(tiny_model: Path) -> None:
    model = build(tiny_model, PLAN)
    layer = model.model.base_model.model.model.layers[0].mlp.up_proj
    own = AutoModelForCausalLM.from_pretrained(tiny_model).model.layers[0].mlp.up_proj.weight
    assert torch.equal(layer.base_layer.weight, own)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    left, sizes, right = torch.linalg.svd(own)
    best = left[:, :4] @ sizes[:4].diag() @ right[:4]
    torch.testing.assert_close(2.0 * b @ a, best, rtol=0, atol=1e-5)
    assert torch.equal(layer.lora_B["start"].weight, -b)
    assert layer.lora_A["start"].weight.data_ptr() != a.data_ptr()
    assert {name.rsplit(".", 2)[1] for name, p in model.named_parameters() if p.requires_grad} == {"default"}


def test_a_bfloat16_base_is_not_rounded_once_more(tiny_model: Path) -> None:
    model = build(tiny_model, PLAN, "bfloat16")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    assert (logits(model.model) - logits(base)).abs().max() < 1e-2


def test_joined_and_parted_are_inverse() -> None:
    for name, shape in (("q.lora_A.weight", (4, 6)), ("q.lora_B.weight", (6, 4))):
        one, other = torch.randn(shape), torch.randn(shape)
        parts = pissa.parted(name, pissa.joined(name, one, other))
        assert torch.equal(parts[0], one)
        assert torch.equal(parts[1], other)


def test_a_module_that_is_too_small_is_named(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot take 40 directions out of .*q_proj, whose weight is \[32, 32\]"):
        build(tiny_model, replace(PLAN, rank=40))
