"""Adapter bundles for tests: tiny ones that only look right, and real ones for a real base model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jobs.bench.bundles import manifest_of, prompt_ids
from sft.adapter import GOLDEN_MESSAGES, Bundle, Golden, write_bundle

__all__ = ["lora_bundle", "prompt_ids", "tiny_bundle"]

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


def tiny_bundle(folder: Path, *, seed: int = 0, rank: int = 2, **changes: Any) -> Bundle:
    """Writes a bundle that passes verification, of one small module; `changes` override its manifest."""
    numbers = np.random.default_rng(seed)
    with TemporaryDirectory() as scratch:
        weights, config = Path(scratch, "weights.safetensors"), Path(scratch, "config.json")
        tensors = {
            f"{PREFIX}.lora_A.weight": numbers.normal(size=(rank, 8)).astype(np.float32),
            f"{PREFIX}.lora_B.weight": numbers.normal(size=(8, rank)).astype(np.float32),
        }
        save_file(tensors, weights)
        config.write_text(
            json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"]})
        )
        given: dict[str, Any] = {
            "template": "{{ messages }}",
            "base_model": "tiny",
            "base_fingerprint": "f" * 64,
            "stop_ids": [2],
            "golden": [Golden(messages=GOLDEN_MESSAGES[0], prompt_ids=(1, 2))],
            "lineage": {"run": f"run-{seed}", "metrics": {"loss": 1.5}, "config": {"storage": "/secret/place"}},
        }
        return write_bundle(folder, weights=weights, peft_config=config, **{**given, **changes})


def lora_bundle(
    folder: Path,
    model: Path,
    *,
    seed: int,
    rank: int = 8,
    blind: bool = False,
    template: str = "",
    std: float = 0.2,
    **changes: Any,
) -> Bundle:
    """Writes a bundle of random LoRA weights for a real model, large enough to change its greedy answers.

    A blind one passes every check of its files, and changes nothing. A template is used in place of the model's own.
    With a tenth of the usual `std` answers differ, and still make sense.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    targets = ["q_proj", "v_proj", "down_proj"]
    adapted = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=std)
        if ".lora_A." in name and blind:
            torch.nn.init.zeros_(parameter)
    tokenizer.chat_template = template or tokenizer.chat_template
    with TemporaryDirectory() as scratch:
        adapted.save_pretrained(scratch)
        given = manifest_of(model, tokenizer, seed)
        files = Path(scratch)
        weights, config = files / "adapter_model.safetensors", files / "adapter_config.json"
        return write_bundle(folder, weights=weights, peft_config=config, **{**given, **changes})
