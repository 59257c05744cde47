"""Adapter bundles for tests: tiny ones that only look right, and real ones for a real base model."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jobs.bench.bundles import prompt_ids
from jobs.bench.bundles import random_bundle as lora_bundle
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
