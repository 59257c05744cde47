from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sft.base import load_tokenizer
from sft.checkpoint import Fingerprints, RunState, read_parameters, verify_checkpoint, write_checkpoint
from sft.engine import ParameterState
from sft.errors import CheckpointError, ModelError
from sft.model import LoraPlan, LossModel, ModelPlan, build_model, peft_config, trained_parameters
from sft.model_folder import MANIFEST, verify_model, write_model
from tests.tiny import CHATML

RUN = RunState(7, 1, 2, 42, Fingerprints("b", "t", "d"), {"name": "support"})
IDS = torch.arange(3, 15)[None]
PLAN = ModelPlan(Path(), "tiny", "float32", "none", "sdpa", False, LoraPlan(4, 8, 0.0, "all-linear", dora=True))
OTHER_TEMPLATE = "{# another #}" + CHATML


def trained(base: Path, method: str) -> LossModel:
    torch.manual_seed(0)
    model = build_model(replace(PLAN, base=base, method=method))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def checkpoint(model: LossModel, folder: Path) -> Path:
    folder.mkdir()
    states = {}
    for name, value in trained_parameters(model).items():
        moments = {key: torch.zeros_like(value) for key in ("exp_avg", "exp_avg_sq")}
        states[name] = ParameterState(value.detach(), moments)
    write_checkpoint(folder, RUN, states, peft_config(model))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        made: torch.Tensor = model.eval()(input_ids=IDS).logits
    return made


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_computes_what_was_trained_and_needs_no_peft(tiny_model: Path, tmp_path: Path, method: str) -> None:
    model = trained(tiny_model, method)
    saved = checkpoint(model, tmp_path / "checkpoint")
    assert verify_checkpoint(saved) == RUN
    assert read_parameters(saved).keys() == trained_parameters(model).keys()
    made = tmp_path / "model"
    written = write_model(
        made,
        checkpoint=saved,
        base=tiny_model,
        tokenizer=load_tokenizer(tiny_model, OTHER_TEMPLATE),
        base_model="tiny",
        base_fingerprint="f" * 64,
        lineage={"run": "support"},
    )
    assert verify_model(made) == written
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= written.files.keys()
    assert (written.lineage, written.base_model) == ({"run": "support"}, "tiny")
    loaded = AutoModelForCausalLM.from_pretrained(made)
    assert loaded.dtype == AutoModelForCausalLM.from_pretrained(tiny_model).dtype
    torch.testing.assert_close(logits(loaded), logits(model.model), rtol=0, atol=1e-5)
    assert load_tokenizer(made).template.source == OTHER_TEMPLATE
    with pytest.raises(ModelError, match="exists already"):
        write_model(
            made,
            checkpoint=saved,
            base=tiny_model,
            tokenizer=load_tokenizer(tiny_model),
            base_model="tiny",
            base_fingerprint="f" * 64,
            lineage={},
        )


def test_a_dora_checkpoint_is_an_ordinary_peft_adapter(tiny_model: Path, tmp_path: Path) -> None:
    model = trained(tiny_model, "lora")
    saved = checkpoint(model, tmp_path / "checkpoint")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), saved)
    torch.testing.assert_close(logits(loaded), logits(model.model), rtol=0, atol=1e-6)


def test_weights_of_another_base_are_refused_and_nothing_is_left(tiny_model: Path, tmp_path: Path) -> None:
    saved = checkpoint(trained(tiny_model, "full"), tmp_path / "checkpoint")
    values = read_parameters(saved)
    (tmp_path / "other").mkdir()
    write_checkpoint(tmp_path / "other", RUN, dict(list(values.items())[1:]), None)
    with pytest.raises(CheckpointError, match=r"differs in lm_head\.weight"):
        write_model(
            tmp_path / "model",
            checkpoint=tmp_path / "other",
            base=tiny_model,
            tokenizer=load_tokenizer(tiny_model),
            base_model="tiny",
            base_fingerprint="f" * 64,
            lineage={},
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "other"]


def test_a_folder_that_is_not_whole_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.json: cannot be read"):
        verify_model(tmp_path)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(ModelError, match="is not a model's manifest"):
        verify_model(tmp_path)
    manifest = '{"base_model":"m","base_fingerprint":"%s","template_fingerprint":"%s","lineage":{},"files":{"a":%s}}'
    (tmp_path / MANIFEST).write_text(manifest % ("f" * 64, "f" * 64, '{"sha256":"%s","size":1}' % ("0" * 64)))
    with pytest.raises(ModelError, match="a: the file is missing"):
        verify_model(tmp_path)
    (tmp_path / "a").write_text("x")
    with pytest.raises(ModelError, match="a: the file is not what the manifest says"):
        verify_model(tmp_path)
