"""A training checkpoint: a folder that holds all that resume needs, and no frozen weight.

Weights and moments are whole tensors by PEFT name, so any number of workers and any ZeRO stage can read them.
`adapter_config.json` and `adapter_model.safetensors` are an ordinary PEFT adapter; full tuning, which freezes nothing,
has `model.safetensors` in their place. No random state is kept: each step's generator is seeded by (seed, step,
worker). `metrics.jsonl` tells of all steps so far. The manifest, with the hash of every file, is written last: a folder
without a matching manifest is not a checkpoint.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, FileHash, hash_file
from sft.engine import MOMENTS, ParameterState
from sft.errors import CheckpointError

MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What a run stands on; a checkpoint is only good for a run with the same. `adapter` is empty for a fresh one."""

    base: str
    template: str
    data: str
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands.

    Rule: `step` counts finished optimizer steps; `epoch` and `epoch_step` name the next step to train (the next
    epoch's first, where this one has no such step), which is the data position: the order of an epoch is a function of
    (seed, epoch) alone. `skipped` counts the finished steps in which the optimizer took none; `finished` says that the
    run has no next step. `history` holds the held-out losses so far, with the steps after which they were measured.
    """

    step: int
    epoch: int
    epoch_step: int
    seed: int
    fingerprints: Fingerprints
    config: dict[str, Any]
    skipped: int = 0
    finished: bool = False
    history: tuple[tuple[int, float], ...] = ()


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int
    files: dict[str, FileHash]


def write_checkpoint(
    folder: Path,
    run: RunState,
    parameters: Mapping[str, ParameterState],
    peft_config: Mapping[str, Any] | None,
    metrics: bytes = b"",
) -> None:
    """Writes a checkpoint into an empty folder, manifest last; without a PEFT config it is one of full tuning.

    Raises:
        OSError: it cannot be written.
    """
    values = {name: state.value.contiguous() for name, state in parameters.items()}
    moments = {
        f"{name}/{key}": moment.contiguous()
        for name, state in parameters.items()
        for key, moment in state.moments.items()
    }
    weights = WEIGHTS if peft_config is None else ADAPTER_WEIGHTS
    try:
        save_file(values, folder / weights, metadata={"format": "pt"})
        save_file(moments, folder / OPTIMIZER)
    except SafetensorError as error:  # its own words for every OSError
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error)) from None
    if peft_config is not None:
        (folder / ADAPTER_CONFIG).write_text(json.dumps(dict(peft_config), indent=1, sort_keys=True), encoding="utf-8")
    (folder / STATE).write_text(json.dumps(asdict(run), indent=1), encoding="utf-8")
    (folder / METRICS).write_bytes(metrics)
    names = (*(() if peft_config is None else (ADAPTER_CONFIG,)), weights, OPTIMIZER, STATE, METRICS)
    manifest = _Manifest(format=1, files={name: hash_file(folder / name) for name in names})
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")


def verify_checkpoint(folder: Path) -> RunState:
    """Proves that a checkpoint is whole, and says where its run stands.

    Raises:
        CheckpointError: a file is missing, damaged or foreign; names it.
    """
    path = folder / MANIFEST
    try:
        manifest = _Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no whole checkpoint: it has no {MANIFEST}") from None
    except ValidationError:
        raise CheckpointError(f"{path}: not a checkpoint's manifest") from None
    for name, wanted in manifest.files.items():
        try:
            got = hash_file(folder / name)
        except OSError:
            raise CheckpointError(f"{folder / name}: the file is missing") from None
        if got != wanted:
            raise CheckpointError(f"{folder / name}: the file is not what the manifest says (size {got.size})")
    try:
        state = json.loads((folder / STATE).read_bytes())
        history = tuple((step, loss) for step, loss in state.get("history", ()))
        return RunState(**{**state, "fingerprints": Fingerprints(**state["fingerprints"]), "history": history})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE}: not a run's state ({error})") from None


def read_metrics(folder: Path) -> bytes:
    """Reads what a verified checkpoint tells of the steps so far, as JSON lines."""
    return (folder / METRICS).read_bytes()


def read_parameters(folder: Path) -> dict[str, ParameterState]:
    """Reads the trained parameters and their moments from a verified checkpoint.

    Raises:
        CheckpointError: a tensor is missing.
    """
    try:
        values: dict[str, Tensor] = load_file(folder / (WEIGHTS if (folder / WEIGHTS).is_file() else ADAPTER_WEIGHTS))
        moments: dict[str, Tensor] = load_file(folder / OPTIMIZER)
        return {
            name: ParameterState(value, {key: moments[f"{name}/{key}"] for key in MOMENTS})
            for name, value in values.items()
        }
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: weights and moments do not belong together ({error})") from None
