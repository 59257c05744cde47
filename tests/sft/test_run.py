from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft import storage
from sft.config import TrainConfig
from sft.errors import TrainingError
from sft.run import fetch_bundle, keep_bundle, open_run, run_folder


def config(root: Path, **changes: Any) -> TrainConfig:
    values = {
        "name": "r",
        "storage": str(root),
        "model": {"base": "m"},
        "data": {"sources": [{"path": "x.jsonl"}]},
        **changes,
    }
    return TrainConfig.model_validate(values)


def test_the_resolved_config_is_saved(tmp_path: Path) -> None:
    folder = open_run(config(tmp_path))
    assert folder.address == f"{tmp_path}/r"
    saved = storage.read(folder.config)
    assert saved is not None
    assert b"learning_rate: 0.0002" in saved


def test_a_run_goes_on_with_the_same_config_on_other_machines(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    open_run(config(tmp_path, scaling={"num_workers": 2}, deepspeed={"zero_stage": 2}, failure={"max_failures": 3}))


def test_another_config_under_the_same_name_is_refused_with_the_fields(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    with pytest.raises(TrainingError) as caught:
        open_run(config(tmp_path, train={"learning_rate": 1e-3, "seed": 4}, model={"base": "other"}))
    assert str(caught.value) == (
        f"run r exists in {tmp_path} with another config:\n"
        "  - model.base: was 'm', now 'other'\n"
        "  - train.learning_rate: was 0.0002, now 0.001\n"
        "  - train.seed: was 0, now 4\n"
        "Choose another `name`, or take the fields back to go on with that run."
    )


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_bundle_is_kept_and_found(tmp_path: Path, scheme: str) -> None:
    folder = run_folder(config(tmp_path, storage=f"{scheme}{tmp_path}"))
    assert fetch_bundle(folder) is None
    made = tmp_path / "made"
    made.mkdir()
    (made / "bundle.json").write_text(json.dumps({"a": 1}))
    kept = keep_bundle(folder, made)
    assert json.loads((kept / "bundle.json").read_text()) == {"a": 1}
    found = fetch_bundle(folder)
    assert found is not None
    assert json.loads((found / "bundle.json").read_text()) == {"a": 1}
