"""What a run's folder tells of the run: read once, for its report page and for the model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from sft import storage
from sft.run import RunFolder


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as its folder tells of it.

    Rule: `config` and `survey` are as they were written, the survey None before the data was counted; `steps` and
    `evaluations` are the lines of metrics.jsonl and evaluations.jsonl by step, each step once.
    """

    config: dict[str, Any]
    survey: dict[str, Any] | None
    steps: tuple[dict[str, Any], ...]
    evaluations: tuple[dict[str, Any], ...]


def read_record(folder: RunFolder) -> RunRecord:
    """Reads a run's folder; works at any time, and with a run that failed.

    Raises:
        StorageError: a file is there but cannot be read.
    """
    survey = storage.read(folder.survey)
    return RunRecord(
        yaml.safe_load(storage.read(folder.config) or b"") or {},
        json.loads(survey) if survey else None,
        _by_step(storage.read(folder.metrics)),
        _by_step(storage.read(folder.evaluations)),
    )


def evaluation_at(record: RunRecord, step: int) -> dict[str, Any] | None:
    """The held-out losses after a step, without the samples; None where none were measured then."""
    found = next((made for made in record.evaluations if made["step"] == step and made["loss"] is not None), None)
    kept = ("step", "loss", "perplexity", "accuracy", "sources")
    return {key: found[key] for key in kept if key in found} if found else None


def _by_step(lines: bytes | None) -> tuple[dict[str, Any], ...]:
    """The records of JSON lines by step; of a step that was done again the last holds."""
    records: dict[int, dict[str, Any]] = {}
    for line in (lines or b"").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a line that was cut off when the driver was killed
            continue
        records[record["step"]] = record
    return tuple(records[step] for step in sorted(records))
