"""A run whose result is no adapter, from raw rows to a model folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from sft.model_folder import verify_model
from sft.trainer import train
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


def test_full_tuning_ends_in_a_model_folder_that_the_same_command_takes_again(
    cluster: str, tmp_path: Path, tiny_model: Path
) -> None:
    assert cluster
    made = config(
        tmp_path,
        tiny_model,
        lora={},
        train={"method": "full", "max_steps": 2, "global_batch_size": 6, "learning_rate": 1e-3},
        deepspeed={"zero_stage": 3},
        scaling={"num_workers": 1},
        checkpoint={"num_to_keep": 1},
    )
    lines: list[str] = []
    result = train(made, lines.append)
    assert (result.bundle, result.steps) == (tmp_path / "runs" / "tiny" / "model", 2)
    assert f"model in {result.bundle}" in lines[-1]
    manifest = verify_model(result.bundle)
    assert (manifest.base_model, manifest.lineage["metrics"]["steps"]) == ("tiny-llama", 2)
    tuned, base = (AutoModelForCausalLM.from_pretrained(folder) for folder in (result.bundle, tiny_model))
    own = dict(base.named_parameters())
    moved = {name for name, value in tuned.named_parameters() if not value.equal(own[name])}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= moved
    again = train(made, lines.append)
    assert (again.reused, again.bundle, again.steps) == (True, result.bundle, 2)
