"""The result of a run whose weights no adapter bundle can hold: an ordinary checkpoint folder with a manifest.

transformers loads it and a server takes it as `base`. `model.json` names every other file with its hash and is written
last, so a folder without a matching one is not a whole model.
"""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from sft.adapter import ADAPTER_CONFIG, HEX_DIGEST, FileHash, hash_file
from sft.base import BaseTokenizer
from sft.checkpoint import WEIGHTS
from sft.errors import CheckpointError, ModelError

MANIFEST = "model.json"
GENERATION = "generation_config.json"


class ModelFolder(BaseModel):
    """The manifest of a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    base_model: str
    base_fingerprint: str = Field(pattern=HEX_DIGEST)
    template_fingerprint: str = Field(pattern=HEX_DIGEST)
    lineage: dict[str, Any]
    files: dict[str, FileHash]


def write_model(
    folder: Path,
    *,
    checkpoint: Path,
    base: Path,
    tokenizer: BaseTokenizer,
    base_model: str,
    base_fingerprint: str,
    lineage: Mapping[str, Any],
) -> ModelFolder:
    """Writes a model: whole, or not at all. Takes memory for the model once, and for DoRA twice.

    Args:
        folder: where the model appears; must not exist.
        checkpoint: a verified checkpoint of full tuning, or of an adapter, which is merged.
        base: folder of the base model, whose config, type and stop ids the result has.
        tokenizer: with the template that training used.
        base_model: the base model's id, as users know it.
        base_fingerprint: see `sft.adapter.base_fingerprint`.
        lineage: data fingerprint, config and metrics of the run.

    Raises:
        ModelError: the folder exists.
        CheckpointError: the checkpoint's weights are not this base's.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; a model is never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model = _merged(checkpoint, base) if (checkpoint / ADAPTER_CONFIG).is_file() else _tuned(checkpoint, base)
        # The base's own file is taken as it is: to write it anew, transformers would have to like all its settings.
        model.generation_config = GenerationConfig()
        model.save_pretrained(work)
        (work / GENERATION).unlink(missing_ok=True)
        if (base / GENERATION).is_file():
            shutil.copyfile(base / GENERATION, work / GENERATION)
        own = copy.deepcopy(tokenizer.tokenizer)
        own.chat_template = tokenizer.template.source
        own.save_pretrained(work)
        manifest = ModelFolder(
            base_model=base_model,
            base_fingerprint=base_fingerprint,
            template_fingerprint=tokenizer.template.fingerprint,
            lineage=dict(lineage),
            files={path.name: hash_file(path) for path in sorted(work.iterdir())},
        )
        (work / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        os.chmod(work, 0o755)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return manifest


def verify_model(folder: Path) -> ModelFolder:
    """Reads a model folder's manifest and proves that every file is there and as it says.

    Raises:
        ModelError: one line that names the file.
    """
    path = folder / MANIFEST
    try:
        manifest = ModelFolder.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read, so this is no finished model ({error.strerror})") from None
    except ValidationError:
        raise ModelError(f"{path}: is not a model's manifest") from None
    for name, wanted in manifest.files.items():
        if not (folder / name).is_file():
            raise ModelError(f"{folder / name}: the file is missing")
        if hash_file(folder / name) != wanted:
            raise ModelError(f"{folder / name}: the file is not what the manifest says")
    return manifest


def _tuned(checkpoint: Path, base: Path) -> Any:
    """The base with a full tuning's weights, in the base's own type."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    own = dict(model.named_parameters())
    with safe_open(checkpoint / WEIGHTS, framework="pt") as file, torch.no_grad():
        odd = sorted(own.keys() ^ set(file.keys()))
        if odd:
            raise CheckpointError(f"{checkpoint / WEIGHTS}: its weights are not those of {base}: differs in {odd[0]}")
        for name, parameter in own.items():
            parameter.copy_(file.get_tensor(name))
    return model


def _merged(checkpoint: Path, base: Path) -> Any:
    """The base with an adapter merged into it in float32, then in the base's own type."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    kept = model.dtype
    return PeftModel.from_pretrained(model.float(), checkpoint).merge_and_unload().to(kept)
