from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sft.batch import MicroBatch, collate
from sft.errors import ModelError
from sft.model import LoraPlan, LossModel, ModelPlan, build_model, peft_config, resolve_dtype, trained_parameters
from tests.sft.steps import examples

ROWS = examples(3, 4)


def plan(base: Path) -> ModelPlan:
    return ModelPlan(base, "tiny", "float32", "none", "sdpa", False, LoraPlan(4, 8, 0.0, "all-linear"))


@pytest.fixture
def model(tiny_model: Path) -> LossModel:
    torch.manual_seed(0)
    made = build_model(plan(tiny_model))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return made.eval()


def run(model: LossModel, batch: MicroBatch) -> float:
    mask = None if batch.attention_mask is None else torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        made: torch.Tensor = model(
            torch.from_numpy(batch.input_ids),
            torch.from_numpy(batch.labels),
            torch.from_numpy(batch.position_ids),
            mask,
        )
        return made.item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_padded_and_alone_give_the_same_loss(tiny_model: Path, attention: str) -> None:
    torch.manual_seed(0)
    model = build_model(replace(plan(tiny_model), attention=attention)).eval()
    alone = sum(run(model, collate([row], "packed", 1)) for row in ROWS)
    assert run(model, collate(ROWS, "packed", 1)) == pytest.approx(alone, rel=1e-6)
    assert run(model, collate(ROWS, "padded", 1)) == pytest.approx(alone, rel=1e-6)


def test_the_whole_losss_is_the_models_own(model: LossModel) -> None:
    batch = collate(ROWS[:1], "packed", 1)
    with torch.no_grad():
        output = model.model(input_ids=torch.from_numpy(batch.input_ids), labels=torch.from_numpy(batch.labels))
    assert run(model, batch) == pytest.approx(float(output.loss) * ROWS[0].trained_tokens, rel=1e-5)


def test_documents_of_a_pack_do_not_see_each_other(model: LossModel) -> None:
    def logits(ids: np.ndarray) -> torch.Tensor:
        packed = collate(ROWS, "packed", 1)
        with torch.no_grad():
            out: torch.Tensor = model.model(
                input_ids=torch.from_numpy(ids),
                position_ids=torch.from_numpy(packed.position_ids),
                use_cache=False,
            ).logits
        return out

    ids = collate(ROWS, "packed", 1).input_ids
    disturbed = ids.copy()
    first, second = len(ROWS[0].input_ids), len(ROWS[0].input_ids) + len(ROWS[1].input_ids)
    disturbed[0, first:second] = 99
    before, after = logits(ids), logits(disturbed)
    assert torch.equal(before[0, :first], after[0, :first])
    assert torch.equal(before[0, second:], after[0, second:])
    assert not torch.equal(before[0, first:second], after[0, first:second])


def test_filling_and_masked_labels_do_not_matter(model: LossModel) -> None:
    assert run(model, collate(ROWS, "padded", 1)) == run(model, collate(ROWS, "padded", 77))


def test_a_batch_without_trained_tokens_has_loss_zero_and_a_gradient(model: LossModel) -> None:
    blank = collate([], "packed", 1)
    loss = model(
        torch.from_numpy(blank.input_ids), torch.from_numpy(blank.labels), torch.from_numpy(blank.position_ids)
    )
    loss.backward()
    assert loss.item() == 0.0
    gradients = [parameter.grad for parameter in trained_parameters(model).values()]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_adapter_names_and_config_are_peft_s(model: LossModel) -> None:
    names = list(trained_parameters(model))
    assert names[0] == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert len(names) == 2 * 7 * 2
    config = peft_config(model)
    assert config is not None
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["base_model_name_or_path"]) == (
        4,
        8,
        "LORA",
        "tiny",
    )
    assert {module.rsplit(".", 1)[-1] for module in config["target_modules"]} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }


def test_only_the_adapter_is_trained_and_in_float32(tiny_model: Path) -> None:
    model = build_model(replace(plan(tiny_model), dtype="bfloat16"))
    kinds = {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}


def test_gradient_checkpointing_gives_the_same_gradient(tiny_model: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = build_model(replace(plan(tiny_model), gradient_checkpointing=checkpointing)).train()
        batch = collate(ROWS, "packed", 1)
        model(
            torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels), torch.from_numpy(batch.position_ids)
        ).backward()
        gradients.append([parameter.grad for parameter in trained_parameters(model).values()])
    assert all(
        one is not None and other is not None and torch.allclose(one, other, atol=1e-6)
        for one, other in zip(*gradients, strict=True)
    )


def test_full_tuning_trains_every_weight_in_float32_under_the_base_s_names(tiny_model: Path) -> None:
    model = build_model(replace(plan(tiny_model), method="full", dtype="bfloat16", gradient_checkpointing=True)).train()
    parameters = trained_parameters(model)
    own = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert parameters.keys() == dict(own.named_parameters()).keys()
    assert peft_config(model) is None
    packed = collate(ROWS, "packed", 1)
    inputs = [torch.from_numpy(array) for array in (packed.input_ids, packed.labels, packed.position_ids)]
    loss = model(*inputs)
    loss.backward()
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all(
        parameter.grad is not None and parameter.grad.dtype == torch.float32 for parameter in parameters.values()
    )
    exact = build_model(replace(plan(tiny_model), method="full"))(*inputs).item()
    assert loss.item() != exact
    assert loss.item() == pytest.approx(exact, rel=1e-2)


def test_noise_comes_in_training_alone_and_with_the_step_s_seed(tiny_model: Path) -> None:
    torch.manual_seed(0)
    model = build_model(replace(plan(tiny_model), neftune_alpha=50.0))
    packed, padded = collate(ROWS, "packed", 1), collate(ROWS, "padded", 1)
    quiet = run(model.eval(), packed)
    model.train()
    noisy = run(model, packed)
    assert abs(noisy - quiet) > 1e-3
    assert run(model, packed) == noisy
    assert run(model, padded) == pytest.approx(noisy, rel=1e-6)
    model.noise_seed = 1
    assert abs(run(model, packed) - noisy) > 1e-3


@pytest.mark.parametrize("rslora", [False, True])
def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path, rslora: bool) -> None:
    model = build_model(replace(plan(tiny_model), lora=LoraPlan(4, 8, 0.0, ["q_proj"], rslora=rslora)))
    layer = model.model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == (4.0 if rslora else 2.0)
    config = peft_config(model)
    assert config is not None
    assert config["use_rslora"] is rslora


def test_a_4_bit_base_trains(tiny_model: Path) -> None:
    model = build_model(replace(plan(tiny_model), quantization="nf4"))
    batch = collate(ROWS, "packed", 1)
    loss = model(
        torch.from_numpy(batch.input_ids), torch.from_numpy(batch.labels), torch.from_numpy(batch.position_ids)
    )
    loss.backward()
    gradients = [p.grad for name, p in trained_parameters(model).items() if "lora_B" in name]
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    assert {type(m).__name__ for m in model.modules() if "4bit" in type(m).__name__} == {"Linear4bit"}


def test_faults_name_what_is_wrong(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        build_model(replace(plan(tiny_model), base=tmp_path))
    with pytest.raises(ModelError, match="target_modules"):
        build_model(replace(plan(tiny_model), lora=LoraPlan(4, 8, 0.0, ["no_such_module"])))
    with pytest.raises(ModelError, match=r"lora_embedding_A.* is no linear module's; name linear modules alone"):
        build_model(replace(plan(tiny_model), lora=LoraPlan(4, 8, 0.0, ["embed_tokens"])))


def test_auto_dtype_follows_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("float32", cpu) is torch.float32
    assert resolve_dtype("bfloat16", cpu) is torch.bfloat16
    for native, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr("sft.model.cpu_has_bfloat16", lambda native=native: native)
        assert resolve_dtype("auto", cpu) is wanted
