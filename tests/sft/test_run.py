from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

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


def test_what_cuts_the_same_work_into_other_pieces_may_change(tmp_path: Path) -> None:
    open_run(config(tmp_path))
    pieces = {"train": {"micro_batch_size": 1, "on_bad_loss": "skip"}, "checkpoint": {"every_steps": 5}}
    model = {"base": "m", "gradient_checkpointing": True}
    open_run(config(tmp_path, **pieces, model=model, scaling={"num_workers": {"min": 1, "max": 2}}))


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"train": {"seed": 1}}, "train.seed: was 0, now 1"),
        ({"train": {"layout": "padded"}}, "train.layout: was 'packed', now 'padded'"),
        ({"train": {"global_batch_size": 8}}, "train.global_batch_size: was 16, now 8"),
        ({"train": {"warmup_ratio": 0.1}}, "train.warmup_ratio: was 0.03, now 0.1"),
        ({"lora": {"alpha": 64}}, "lora.alpha: was 32.0, now 64.0"),
        ({"model": {"base": "m", "dtype": "float32"}}, "model.dtype: was 'auto', now 'float32'"),
        ({"data": {"sources": [{"path": "y.jsonl"}]}}, "data.sources.0.path: was 'x.jsonl', now 'y.jsonl'"),
        ({"data": {"sources": [{"path": "x.jsonl"}], "max_length": 9}}, "data.max_length: was 2048, now 9"),
    ],
)
def test_what_is_trained_may_not_change(tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    open_run(config(tmp_path))
    with pytest.raises(TrainingError) as caught:
        open_run(config(tmp_path, **changes))
    assert str(caught.value).splitlines()[1:] == [
        f"  - {line}",
        "Choose another `name`, or take the fields back to go on with that run.",
    ]


@pytest.mark.parametrize("changes", [{"epochs": 3}, {"epochs": 2, "max_steps": 50}])
def test_a_longer_run_is_another_run(tmp_path: Path, changes: dict[str, int]) -> None:
    open_run(config(tmp_path, train={"epochs": 2}))
    with pytest.raises(TrainingError, match=r"learning rate was planned for its length, so a longer run is another"):
        open_run(config(tmp_path, train=changes))


def test_fields_that_are_younger_than_the_run_had_their_default(tmp_path: Path) -> None:
    folder = open_run(config(tmp_path))
    saved = yaml.safe_load(storage.read(folder.config) or b"")
    del saved["train"]["on_bad_loss"], saved["train"]["layout"], saved["scaling"]
    storage.write(folder.config, yaml.safe_dump(saved).encode())
    open_run(config(tmp_path))


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
