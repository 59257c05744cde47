"""A run's folder: what lies where, and whether a run of this name may start, go on, or is finished."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft import storage
from sft.config import TrainConfig
from sft.errors import TrainingError

FREE_KEYS = ("registry", "alias", "storage", "scaling", "failure", "checkpoint", "ray", "deepspeed", "tracking")
"""Keys of a config that may change when a run goes on: they do not change what is trained."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Addresses in a run's folder."""

    address: str

    @property
    def config(self) -> str:
        """The resolved config."""
        return f"{self.address}/config.yaml"

    @property
    def metrics(self) -> str:
        """Every step as a JSON line."""
        return f"{self.address}/metrics.jsonl"

    @property
    def evaluations(self) -> str:
        """Every evaluation as a JSON line."""
        return f"{self.address}/evaluations.jsonl"

    @property
    def report(self) -> str:
        """The report page."""
        return f"{self.address}/report.html"

    @property
    def quarantine(self) -> str:
        """Refused rows as JSON lines."""
        return f"{self.address}/quarantine.jsonl"

    @property
    def survey(self) -> str:
        """What the data holds."""
        return f"{self.address}/survey.json"

    @property
    def bundle(self) -> str:
        """The finished adapter bundle."""
        return f"{self.address}/bundle"


def run_folder(config: TrainConfig) -> RunFolder:
    """The folder of a config's run."""
    root = config.storage if "://" in config.storage else str(Path(config.storage).expanduser().absolute())
    return RunFolder(f"{root.rstrip('/')}/{config.name}")


def open_run(config: TrainConfig) -> RunFolder:
    """Starts a run's folder, or takes up the one that is there.

    Raises:
        TrainingError: a run of this name exists and was started with another config; names the fields.
        StorageError: the storage cannot be written.
    """
    folder = run_folder(config)
    values = config.model_dump(mode="json")
    before = storage.read(folder.config)
    if before is not None:
        changed = _differences(yaml.safe_load(before), values)
        if changed:
            shown = "\n".join(f"  - {key}: was {old!r}, now {new!r}" for key, old, new in changed)
            raise TrainingError(
                f"run {config.name} exists in {config.storage} with another config:\n{shown}\n"
                "Choose another `name`, or take the fields back to go on with that run."
            )
    storage.write(folder.config, yaml.safe_dump(values, sort_keys=False).encode())
    return folder


def fetch_bundle(folder: RunFolder) -> Path | None:
    """The finished bundle as a local folder; None while the run is not finished."""
    if storage.read(f"{folder.bundle}/bundle.json") is None:
        return None
    if "://" not in folder.bundle:
        return Path(folder.bundle)
    local = Path(tempfile.mkdtemp(prefix="raysft-")) / "bundle"
    storage.download(folder.bundle, local)
    return local


def keep_bundle(folder: RunFolder, made: Path) -> Path:
    """Moves a freshly made bundle into the run's folder; returns where it can be read locally."""
    if "://" in folder.bundle:
        storage.upload(made, folder.bundle, last="bundle.json")
        return made
    target = Path(folder.bundle)
    shutil.rmtree(target, ignore_errors=True)
    shutil.move(made, target)
    return target


def save_json(address: str, values: dict[str, Any]) -> None:
    """Writes plain values as a JSON file."""
    storage.write(address, (json.dumps(values, indent=1) + "\n").encode())


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted({*old, *new}):
        if not prefix and key in FREE_KEYS:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found
