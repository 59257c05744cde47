"""The adapter that a run goes on from: a finished bundle, proven to fit before a worker is started."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from sft import storage
from sft.adapter import ADAPTER_CONFIG, ADAPTER_WEIGHTS, base_fingerprint, base_tensors, check_base, verify_bundle
from sft.config import TrainConfig
from sft.errors import AdapterError
from sft.model import LoraPlan


@dataclass(frozen=True, slots=True, eq=False)
class StartAdapter:
    """An adapter's shape and weights; `weights` have their names in files, `fingerprint` is the hash of their file."""

    lora: LoraPlan
    weights: Mapping[str, Tensor]
    fingerprint: str


def start_of(config: TrainConfig, base: Path, template: str, folder: Path | None = None) -> StartAdapter | None:
    """Reads the adapter that a run goes on from; None where it begins with a fresh one.

    Args:
        config: the run.
        base: folder of its base model.
        template: fingerprint of its chat template.
        folder: the bundle, where `model.adapter` names a registry's version.

    Raises:
        RaysftError: it cannot be read, is damaged, or was made for another base model or chat template.
    """
    address = config.model.adapter
    if address is None:
        return None
    with tempfile.TemporaryDirectory(prefix="raysft-start-") as work:
        if folder is None and "://" in address:
            folder = Path(work) / "bundle"
            storage.download(address, folder)
        return read_start(folder or Path(address).expanduser(), base, template, config.lora.dropout)


def read_start(folder: Path, base: Path, template: str, dropout: float) -> StartAdapter:
    """Reads a bundle to go on from.

    Args:
        folder: the bundle.
        base: folder of the run's base model.
        template: fingerprint of the run's chat template.
        dropout: of the run; a bundle has none.

    Raises:
        AdapterError: it is damaged, or was made for another base model or chat template.
    """
    bundle = verify_bundle(folder)
    if bundle.base_fingerprint != base_fingerprint(base):
        raise AdapterError(f"model.adapter {folder}: was made for another base model, {bundle.base_model}")
    if bundle.template_fingerprint != template:
        raise AdapterError(
            f"model.adapter {folder}: was trained with another chat template; name the one in the bundle as "
            "model.chat_template"
        )
    check_base(folder, base_tensors(base))
    settings = json.loads((folder / ADAPTER_CONFIG).read_bytes())
    lora = LoraPlan(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=dropout,
        target_modules=settings["target_modules"],
        rslora=settings.get("use_rslora", False),
    )
    weights = load_file(folder / ADAPTER_WEIGHTS)
    return StartAdapter(lora, weights, bundle.files[ADAPTER_WEIGHTS].sha256)
