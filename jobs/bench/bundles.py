"""Adapter bundles of random weights for a real base model, large enough to change its greedy answers."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sft.adapter import GOLDEN_MESSAGES, Bundle, Golden, base_fingerprint, base_tensors, write_bundle

TARGETS = ("down_proj", "q_proj", "v_proj")


def random_bundle(
    folder: Path,
    model: Path,
    *,
    seed: int,
    rank: int = 8,
    strength: float = 0.2,
    **changes: Any,
) -> Bundle:
    """Writes a bundle as a training run would; A is drawn as PEFT draws it, B as if trained far.

    Args:
        folder: where to; must not be there.
        model: folder of the base model.
        seed: another one, other weights.
        rank: of every LoRA module.
        strength: standard deviation of B; at 0.2 texts stay sensible, at 0.4 they differ from the first word on.
        changes: override what the manifest says.
    """
    from transformers import AutoTokenizer

    draw = np.random.default_rng(seed)
    tensors = {}
    for name, info in sorted(base_tensors(model).items()):
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS:
            outputs, inputs = info.shape
            bound = inputs**-0.5
            before, after = draw.uniform(-bound, bound, (rank, inputs)), draw.normal(0, strength, (outputs, rank))
            tensors[f"base_model.model.{module}.lora_A.weight"] = before.astype(np.float32)
            tensors[f"base_model.model.{module}.lora_B.weight"] = after.astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": TARGETS,
        "bias": "none",
    }
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    with TemporaryDirectory() as scratch:
        weights, peft_config = Path(scratch, "adapter_model.safetensors"), Path(scratch, "adapter_config.json")
        save_file(tensors, weights)
        peft_config.write_text(json.dumps(config))
        given = manifest_of(model, tokenizer, seed)
        return write_bundle(folder, weights=weights, peft_config=peft_config, **{**given, **changes})


def manifest_of(model: Path, tokenizer: Any, seed: int) -> dict[str, Any]:
    """What the manifest of a bundle for a base model says, its golden prompts by the tokenizer's chat template."""
    return {
        "template": tokenizer.chat_template,
        "base_model": "smollm2-135m-instruct",
        "base_fingerprint": base_fingerprint(model),
        "stop_ids": [tokenizer.eos_token_id],
        "golden": [
            Golden(messages=messages, prompt_ids=tuple(prompt_ids(tokenizer, list(messages))))
            for messages in GOLDEN_MESSAGES
        ],
        "lineage": {"run": f"seed-{seed}"},
    }


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The exact ids that training uses as the prompt for these messages."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    return [int(token) for token in ids]
