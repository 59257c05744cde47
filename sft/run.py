"""A run's folder: what lies where, and whether a run of this name may start, go on, or is finished."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft import storage
from sft.config import TrainConfig
from sft.errors import TrainingError

FREE_KEYS = ("registry", "alias", "storage", "scaling", "failure", "checkpoint", "ray", "deepspeed", "tracking")
"""Sections of a config that may change when a run goes on: they do not change what is trained."""
FREE_FIELDS = ("train.micro_batch_size", "train.on_bad_loss", "model.gradient_checkpointing")
"""Fields of other sections that may change, too: they cut the same work into other pieces."""
Change = tuple[str, Any, Any]
"""A key, its old and its new value."""


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

    @property
    def model(self) -> str:
        """The finished model, of a run that makes no adapter bundle."""
        return f"{self.address}/model"


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
    check_run(config)
    values = config.model_dump(mode="json")
    storage.write(folder.config, yaml.safe_dump(values, sort_keys=False).encode())
    return folder


def check_run(config: TrainConfig) -> bool:
    """Whether there is a run of this name already; it may go on with this config. Writes nothing.

    Raises:
        TrainingError: it was started with another config; names the fields.
        StorageError: the storage cannot be read.
    """
    values = config.model_dump(mode="json")
    before = storage.read(run_folder(config).config)
    if before is not None:
        changed = changed_keys(yaml.safe_load(before), values)
        if changed:
            raise TrainingError(
                f"run {config.name} exists in {config.storage} with another config:\n{told_changes(changed)}"
            )
    return before is not None


def fetch_bundle(folder: RunFolder) -> Path | None:
    """The finished bundle as a local folder; None while the run is not finished."""
    return _fetch(folder.bundle, "bundle.json")


def fetch_model(folder: RunFolder) -> Path | None:
    """The finished model as a local folder; None while the run is not finished."""
    return _fetch(folder.model, "model.json")


def keep_bundle(folder: RunFolder, made: Path) -> Path:
    """Copies a freshly made bundle into the run's folder; returns where it can be read locally."""
    return _keep(folder.bundle, made, "bundle.json")


def keep_model(folder: RunFolder, made: Path) -> Path:
    """Copies a freshly made model into the run's folder; returns where it can be read locally."""
    return _keep(folder.model, made, "model.json")


def _fetch(address: str, manifest: str) -> Path | None:
    if storage.read(f"{address}/{manifest}") is None:
        return None
    if "://" not in address:
        return Path(address)
    local = Path(tempfile.mkdtemp(prefix="raysft-")) / address.rsplit("/", 1)[1]
    storage.download(address, local)
    return local


def _keep(address: str, made: Path, manifest: str) -> Path:
    storage.remove(address)  # half of one, from a run that was stopped here
    storage.upload(made, address, last=manifest)
    return made if "://" in address else Path(address)


def save_json(address: str, values: dict[str, Any]) -> None:
    """Writes plain values as a JSON file."""
    storage.write(address, (json.dumps(values, indent=1) + "\n").encode())


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two resolved configs that a run may not change on its way.

    The learning rate follows the share of the run that is done, so the length of a run is part of it, too. Keys that
    the old config does not know, being older than they, had their default.
    """
    with suppress(ValidationError):
        old = TrainConfig.model_validate(old).model_dump(mode="json")
    before, after = ({key: value for key, value in values.items() if key not in FREE_KEYS} for values in (old, new))
    return [change for change in _differences(before, after) if change[0] not in FREE_FIELDS]


def told_changes(changed: Sequence[Change]) -> str:
    """Changes, one a line, and what to do about them."""
    shown = "\n".join(f"  - {key}: was {old!r}, now {new!r}" for key, old, new in changed)
    length = any(key in ("train.epochs", "train.max_steps") for key, _, _ in changed)
    return f"{shown}\nChoose another `name`, or take the fields back to go on with that run." + (
        " Its learning rate was planned for its length, so a longer run is another one." if length else ""
    )


def _differences(old: Any, new: Any, key: str = "") -> list[Change]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        inner = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        inner = [(str(place), *pair) for place, pair in enumerate(zip(old, new, strict=True))]
    else:
        return [] if old == new else [(key, old, new)]
    return [
        change
        for name, before, after in inner
        for change in _differences(before, after, f"{key}.{name}" if key else name)
    ]
