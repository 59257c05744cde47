from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from sft.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    TEMPLATE,
    Bundle,
    Golden,
    base_fingerprint,
    hash_file,
    read_manifest,
    verify_bundle,
    write_bundle,
)
from sft.errors import AdapterError

Weights = dict[str, npt.NDArray[Any]]
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def good() -> Weights:
    return {
        f"{NAME}.lora_A.weight": np.full((2, 8), 0.5, np.float32),
        f"{NAME}.lora_B.weight": np.full((8, 2), 0.25, np.float32),
    }


def make(folder: Path, weights: Weights | None = None, config: dict[str, Any] | None = None) -> Bundle:
    sources = folder.parent / "sources"
    sources.mkdir(exist_ok=True)
    save_file(weights or good(), sources / "w.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **(config or {})}
    (sources / "c.json").write_text(json.dumps(settings))
    return write_bundle(
        folder,
        weights=sources / "w.safetensors",
        peft_config=sources / "c.json",
        template="{{ messages }}",
        base_model="tiny",
        base_fingerprint="f" * 64,
        stop_ids=[1],
        golden=[Golden(messages=({"role": "user", "content": "Hi"},), prompt_ids=(1, 2, 3))],
        lineage={"run": "r"},
    )


def test_a_bundle_reads_back_as_written(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    assert verify_bundle(tmp_path / "b") == made == read_manifest(tmp_path / "b")
    assert (made.rank, made.target_modules, made.stop_ids) == (2, ("q_proj",), (1,))
    assert {path.name for path in (tmp_path / "b").iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE, MANIFEST}
    assert {path.name for path in tmp_path.iterdir()} == {"b", "sources"}


def test_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "b")
    with pytest.raises(AdapterError, match="exists already"):
        make(tmp_path / "b")


def with_weights(change: Callable[[Weights], object]) -> Weights:
    weights = good()
    change(weights)
    return weights


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (with_weights(lambda w: w.update({f"{NAME}.lora_B.weight": np.zeros((8, 2), np.float32)})), "lora_B is zero"),
        (with_weights(lambda w: w[f"{NAME}.lora_A.weight"].__setitem__((0, 0), np.nan)), "NaN or infinite"),
        (with_weights(lambda w: w[f"{NAME}.lora_B.weight"].__setitem__((0, 0), np.inf)), "NaN or infinite"),
        (with_weights(lambda w: w.pop(f"{NAME}.lora_B.weight")), "has no partner"),
        (with_weights(lambda w: w.update({"model.embed.weight": np.ones((2, 2), np.float32)})), "is no LoRA weight"),
        (with_weights(lambda w: w.update({f"{NAME}.lora_A.weight": np.ones((3, 8), np.float32)})), "fit rank 2"),
    ],
)
def test_unfit_weights_are_refused_and_nothing_is_left(tmp_path: Path, weights: Weights, words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        make(tmp_path / "b", weights)
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


@pytest.mark.parametrize(
    ("config", "words"),
    [({"peft_type": "IA3"}, "only LORA"), ({"r": "x"}, "not a PEFT LoRA"), ({"r": 4}, "does not fit rank 4")],
)
def test_an_unfit_config_is_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        make(tmp_path / "b", config=config)


def add_file(folder: Path) -> None:
    (folder / "adapter_model.bin").write_bytes(b"pickle")


def link(folder: Path) -> None:
    target = folder.parent / "elsewhere"
    (folder / TEMPLATE).rename(target)
    (folder / TEMPLATE).symlink_to(target)


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / ADAPTER_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / ADAPTER_WEIGHTS).write_bytes(data)


def lie_about_rank(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "rank": 8}))


def lie_about_template(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "template_fingerprint": "0" * 64}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "is no adapter bundle"),
        (lambda folder: (folder / MANIFEST).write_text("{}"), "Field required"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), "the file is missing"),
        (lambda folder: (folder / ADAPTER_WEIGHTS).write_bytes(b"x"), "not what the manifest says"),
        (add_file, "is not in the manifest"),
        (link, "must be a plain file"),
        (flip_byte, "not what the manifest says"),
        (lie_about_rank, "rank or target_modules differ"),
        (lie_about_template, "the template is not the one"),
    ],
)
def test_a_damaged_bundle_is_refused(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(AdapterError, match=words):
        verify_bundle(tmp_path / "b")


def test_truncated_safetensors_are_refused(tmp_path: Path) -> None:
    make(tmp_path / "b")
    path = tmp_path / "b" / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-8])
    manifest = json.loads((tmp_path / "b" / MANIFEST).read_text())
    manifest["files"][ADAPTER_WEIGHTS] = hash_file(path).model_dump()
    (tmp_path / "b" / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(AdapterError, match="not readable as safetensors"):
        verify_bundle(tmp_path / "b")


def test_base_fingerprint_tells_models_apart_and_not_folders(tmp_path: Path) -> None:
    def base(name: str, value: float, width: int = 4) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"hidden_size": width, "_name_or_path": name, "dtype": name}))
        save_file({"w": np.full((4, width), value, np.float32)}, folder / "model.safetensors")
        return folder

    one = base_fingerprint(base("a", 1.0))
    assert base_fingerprint(base("b", 1.0)) == one
    assert base_fingerprint(base("c", 1.5)) != one
    assert base_fingerprint(base("d", 1.0, width=8)) != one
    with pytest.raises(AdapterError, match=r"config\.json"):
        base_fingerprint(tmp_path)
