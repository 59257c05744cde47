from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sft.checkpoint import (
    MANIFEST,
    OPTIMIZER,
    STATE,
    Fingerprints,
    RunState,
    read_parameters,
    verify_checkpoint,
    write_checkpoint,
)
from sft.engine import ParameterState
from sft.errors import CheckpointError

RUN = RunState(7, 1, 2, 42, Fingerprints("b", "t", "d"), {"name": "support"})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    parameters = {
        f"model.q.lora_{side}.weight": ParameterState(
            torch.randn(2, 3), {"exp_avg": torch.randn(2, 3), "exp_avg_sq": torch.rand(2, 3)}
        )
        for side in "AB"
    }
    write_checkpoint(tmp_path, RUN, parameters, {"peft_type": "LORA", "r": 2})
    return tmp_path


def test_what_was_written_is_read(checkpoint: Path) -> None:
    assert verify_checkpoint(checkpoint) == RUN
    torch.manual_seed(0)
    read = read_parameters(checkpoint)
    for side in "AB":
        state = read[f"model.q.lora_{side}.weight"]
        for tensor in (state.value, state.moments["exp_avg"]):
            assert torch.equal(tensor, torch.randn(2, 3))
        assert torch.equal(state.moments["exp_avg_sq"], torch.rand(2, 3))


def test_it_holds_no_frozen_weight_and_no_pickle(checkpoint: Path) -> None:
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "metrics.jsonl",
        "optimizer.safetensors",
        "state.json",
    ]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", OPTIMIZER, STATE, "adapter_config.json"])
def test_a_damaged_file_is_named(checkpoint: Path, name: str) -> None:
    path = checkpoint / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(checkpoint)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: the file is missing"):
        verify_checkpoint(checkpoint)


def test_without_its_manifest_it_is_none(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_text(json.dumps({"files": 3}))
    with pytest.raises(CheckpointError, match="not a checkpoint's manifest"):
        verify_checkpoint(checkpoint)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="is no whole checkpoint"):
        verify_checkpoint(checkpoint)
