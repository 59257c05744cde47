from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tempfile
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
    CARD,
    MANIFEST,
    TEMPLATE,
    Bundle,
    Golden,
    TensorInfo,
    base_fingerprint,
    base_tensors,
    check_base,
    hash_file,
    read_manifest,
    verify_bundle,
    write_bundle,
)
from sft.errors import AdapterError

Weights = dict[str, npt.NDArray[Any]]
Damage = Callable[[Path], object]
RAN = f"{tempfile.gettempdir()}/raysft-a-pickle-ran-{os.getpid()}"


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(RAN),)


PICKLE = pickle.dumps(Payload())
NAME = "base_model.model.model.layers.0.self_attn.q_proj"


def good() -> Weights:
    return {
        f"{NAME}.lora_A.weight": np.full((2, 8), 0.5, np.float32),
        f"{NAME}.lora_B.weight": np.full((8, 2), 0.25, np.float32),
    }


def make(
    folder: Path, weights: Weights | None = None, config: dict[str, Any] | None = None, card: str | None = None
) -> Bundle:
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
        card=card,
    )


def test_a_bundle_reads_back_as_written(tmp_path: Path) -> None:
    made = make(tmp_path / "b")
    assert verify_bundle(tmp_path / "b") == made == read_manifest(tmp_path / "b")
    assert (made.rank, made.target_modules, made.stop_ids) == (2, ("q_proj",), (1,))
    assert {path.name for path in (tmp_path / "b").iterdir()} == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE, MANIFEST}
    assert {path.name for path in tmp_path.iterdir()} == {"b", "sources"}


def test_a_model_card_is_part_of_a_bundle(tmp_path: Path) -> None:
    made = make(tmp_path / "b", card="# Ä card\n")
    assert verify_bundle(tmp_path / "b") == made
    assert made.files.keys() == {ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE, CARD}
    (tmp_path / "b" / CARD).write_text("# Another\n")
    with pytest.raises(AdapterError, match=r"README\.md: the file is not what the manifest says"):
        verify_bundle(tmp_path / "b")


def test_a_card_that_the_manifest_does_not_name_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / CARD).write_text("# Slipped in\n")
    with pytest.raises(AdapterError, match=r"README\.md: the file is not in the manifest"):
        verify_bundle(tmp_path / "b")


def test_a_bundle_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "b")
    with pytest.raises(AdapterError, match="exists already"):
        make(tmp_path / "b")


def resign(folder: Path) -> None:
    """Makes the manifest's hashes those of the files, so that a fault must be found by what it is."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: hash_file(folder / name).model_dump() for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def weights(change: Callable[[Weights], object]) -> Damage:
    def damage(folder: Path) -> None:
        tensors = good()
        change(tensors)
        save_file(tensors, folder / ADAPTER_WEIGHTS)
        resign(folder)

    return damage


def raw_weights(change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / ADAPTER_WEIGHTS
        path.write_bytes(change(path.read_bytes()))
        resign(folder)

    return damage


def header(text: str) -> Damage:
    return raw_weights(lambda _: struct.pack("<Q", len(text)) + text.encode())


def config(**settings: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        resign(folder)

    return damage


def raw_config(text: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / ADAPTER_CONFIG).write_text(text)
        resign(folder)

    return damage


def manifest(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return damage


def listed(name: str) -> Damage:
    """The manifest names one more file, truthfully where it is there."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        content["files"][name] = {"sha256": hashlib.sha256(PICKLE).hexdigest(), "size": len(PICKLE)}
        (folder / MANIFEST).write_text(json.dumps(content))
        if "/" not in name and "\0" not in name:
            (folder / name).write_bytes(PICKLE)

    return damage


def unlisted(name: str) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / MANIFEST).read_text())
        del content["files"][name]
        (folder / MANIFEST).write_text(json.dumps(content))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def link(name: str) -> Damage:
    def damage(folder: Path) -> None:
        target = folder.parent / "elsewhere"
        (folder / name).rename(target)
        (folder / name).symlink_to(target)

    return damage


def flip_byte(folder: Path) -> None:
    data = bytearray((folder / ADAPTER_WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / ADAPTER_WEIGHTS).write_bytes(data)


def subfolder(folder: Path) -> None:
    (folder / "hooks").mkdir()
    (folder / "hooks" / "setup.py").write_text("")


LONG = "x" * 200
A, B = f"{NAME}.lora_A.weight", f"{NAME}.lora_B.weight"
ONES = np.ones((2, 8), np.float32)
EMPTY_HEADER = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'

CORRUPTED: dict[str, tuple[Damage, str]] = {
    # The files and the manifest
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), f"is no adapter bundle: it has no {MANIFEST}"),
    "empty manifest": (write(MANIFEST, b""), f"{MANIFEST}: manifest: Invalid JSON"),
    "manifest without fields": (write(MANIFEST, b"{}"), f"{MANIFEST}: base_model: Field required"),
    "manifest with an unknown field": (manifest(hook="x"), f"{MANIFEST}: hook: Extra inputs are not permitted"),
    "manifest of another format": (manifest(format=2), f"{MANIFEST}: format: "),
    "manifest that is a link": (link(MANIFEST), f"{MANIFEST}: must be a plain file"),
    "no golden prompts": (manifest(golden=[]), f"{MANIFEST}: golden: "),
    "fingerprint that is none": (manifest(base_fingerprint="f"), f"{MANIFEST}: base_fingerprint: "),
    "weights missing": (lambda folder: (folder / ADAPTER_WEIGHTS).unlink(), f"{ADAPTER_WEIGHTS}: the file is missing"),
    "weights cut": (write(ADAPTER_WEIGHTS, b"x"), f"{ADAPTER_WEIGHTS}: the file is not what the manifest says"),
    "one bit flipped": (flip_byte, f"{ADAPTER_WEIGHTS}: the file is not what the manifest says"),
    "weights that are a link": (link(ADAPTER_WEIGHTS), f"{ADAPTER_WEIGHTS}: must be a plain file"),
    "template that is a link": (link(TEMPLATE), f"{TEMPLATE}: must be a plain file"),
    "unlisted pickle": (write("adapter_model.bin", PICKLE), "adapter_model.bin: the file is not in the manifest"),
    "unlisted code": (write("modeling.py", b""), "modeling.py: the file is not in the manifest"),
    "unlisted folder": (subfolder, "hooks: the file is not in the manifest"),
    "listed pickle": (listed("adapter_model.bin"), f"{MANIFEST}: files: .* differs in 'adapter_model.bin'"),
    "listed embeddings": (listed("new_embeddings.safetensors"), f"{MANIFEST}: files: .* differs in 'new_embeddings"),
    "file above the folder": (listed("../../escape"), f"{MANIFEST}: files: .* differs in '../../escape'"),
    "file at the root": (listed("/etc/passwd"), f"{MANIFEST}: files: .* differs in '/etc/passwd'"),
    "file name with NUL": (listed("a\0b"), f"{MANIFEST}: files: .* differs in "),
    "file name without end": (listed(LONG), f"{MANIFEST}: files: .* differs in 'x{{80}}'"),
    "template not listed": (unlisted(TEMPLATE), f"{MANIFEST}: files: .* differs in '{TEMPLATE}'"),
    "weights not listed": (unlisted(ADAPTER_WEIGHTS), f"{MANIFEST}: files: .* differs in '{ADAPTER_WEIGHTS}'"),
    "another rank in the manifest": (manifest(rank=8), f"{ADAPTER_CONFIG}: r: is 2, but rank 8 in the manifest"),
    "other modules in the manifest": (manifest(target_modules=["v_proj"]), f"{ADAPTER_CONFIG}: target_modules: "),
    "another template in the manifest": (manifest(template_fingerprint="0" * 64), f"{TEMPLATE}: the template is not"),
    # The adapter's config
    "config that is no JSON": (
        raw_config("{"),
        f"{ADAPTER_CONFIG}: not readable as JSON",
    ),
    "config that is a list": (
        raw_config("[]"),
        f"{ADAPTER_CONFIG}: not a PEFT LoRA configuration",
    ),
    "not LoRA": (config(peft_type="IA3"), f'{ADAPTER_CONFIG}: peft_type: is "IA3"; only LORA'),
    "rank of another kind": (config(r="2"), f'{ADAPTER_CONFIG}: r: is "2"; must be a positive integer'),
    "rank that is a boolean": (config(r=True), f"{ADAPTER_CONFIG}: r: is true"),
    "rank zero": (config(r=0), f"{ADAPTER_CONFIG}: r: is 0"),
    "no alpha": (config(lora_alpha=None), f"{ADAPTER_CONFIG}: lora_alpha: is null"),
    "alpha NaN": (config(lora_alpha=float("nan")), f"{ADAPTER_CONFIG}: lora_alpha: is NaN"),
    "alpha without end": (config(lora_alpha=10**400), f"{ADAPTER_CONFIG}: lora_alpha: is 1000"),
    "no targets": (config(target_modules=[]), f"{ADAPTER_CONFIG}: target_modules: is \\[\\]"),
    "target that is no text": (config(target_modules=[1]), f"{ADAPTER_CONFIG}: target_modules: is \\[1\\]"),
    "target that is no pattern": (config(target_modules="("), f"{ADAPTER_CONFIG}: target_modules: is no pattern"),
    "DoRA": (config(use_dora=True), f"{ADAPTER_CONFIG}: use_dora: is true, which the engine does not serve"),
    "qaLoRA": (config(use_qalora=True), f"{ADAPTER_CONFIG}: use_qalora: is true"),
    "LoRA with biases": (config(lora_bias=True), f"{ADAPTER_CONFIG}: lora_bias: is true"),
    "trained biases": (config(bias="lora_only"), f'{ADAPTER_CONFIG}: bias: is "lora_only"'),
    "whole modules": (config(modules_to_save=["lm_head"]), f"{ADAPTER_CONFIG}: modules_to_save: is "),
    "trained tokens": (config(trainable_token_indices=[5]), f"{ADAPTER_CONFIG}: trainable_token_indices: is "),
    "ranks by module": (config(rank_pattern={"q_proj": 4}), f"{ADAPTER_CONFIG}: rank_pattern: is "),
    "alphas by module": (config(alpha_pattern={"q_proj": 4}), f"{ADAPTER_CONFIG}: alpha_pattern: is "),
    "layers that repeat": (config(layer_replication=[[0, 1]]), f"{ADAPTER_CONFIG}: layer_replication: is "),
    "single parameters": (config(target_parameters=["w"]), f"{ADAPTER_CONFIG}: target_parameters: is "),
    "woken by tokens": (config(alora_invocation_tokens=[1]), f"{ADAPTER_CONFIG}: alora_invocation_tokens: is "),
    "a setting of tomorrow": (config(use_tomorrow=0), f"{ADAPTER_CONFIG}: use_tomorrow: is 0"),
    "base weights moved": (config(init_lora_weights="pissa"), f'{ADAPTER_CONFIG}: init_lora_weights: is "pissa"'),
    # The weights
    "header cut": (raw_weights(lambda data: data[:5]), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "header cut in the middle": (
        raw_weights(lambda data: data[:40]),
        f"{ADAPTER_WEIGHTS}: not readable as safetensors",
    ),
    "header too long": (
        raw_weights(lambda data: struct.pack("<Q", 1 << 60) + data[8:]),
        f"{ADAPTER_WEIGHTS}: not readable as safetensors",
    ),
    "header that is no JSON": (header("{{{{"), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "header beyond the data": (header(EMPTY_HEADER), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "data cut": (raw_weights(lambda data: data[:-8]), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "data too long": (raw_weights(lambda data: data + b"x" * 8), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "a pickle by another name": (raw_weights(lambda _: PICKLE), f"{ADAPTER_WEIGHTS}: not readable as safetensors"),
    "no tensors": (header("{}"), f"{ADAPTER_WEIGHTS}: holds no weights"),
    "NaN": (weights(lambda w: w[A].__setitem__((1, 7), np.nan)), f"{A}: holds NaN or infinite numbers"),
    "infinity": (weights(lambda w: w[B].__setitem__((0, 0), -np.inf)), f"{B}: holds NaN or infinite numbers"),
    "NaN in half": (weights(lambda w: w.update({A: np.full((2, 8), np.nan, np.float16)})), f"{A}: holds NaN"),
    "all zero": (weights(lambda w: w.update({B: np.zeros((8, 2), np.float32)})), "every lora_B is zero"),
    "minus zero": (weights(lambda w: w.update({B: np.full((8, 2), -0.0, np.float32)})), "every lora_B is zero"),
    "integers": (weights(lambda w: w.update({A: np.ones((2, 8), np.int32)})), f"{A}: its type is I32; allowed: F32"),
    "doubles": (weights(lambda w: w.update({A: np.ones((2, 8))})), f"{A}: its type is F64"),
    "no partner": (weights(lambda w: w.pop(B)), f"{A}: has no partner {B}"),
    "another rank": (weights(lambda w: w.update({A: np.ones((3, 8), np.float32)})), f"{A}: its shape .* fit rank 2"),
    "another rank in the config": (
        lambda folder: (config(r=4)(folder), manifest(rank=4)(folder)),
        r"its shape \[2, 8\] does not fit rank 4",
    ),
    "turned": (weights(lambda w: w.update({B: np.ones((2, 8), np.float32)})), f"{B}: its shape .* fit rank 2"),
    "three axes": (weights(lambda w: w.update({A: np.ones((2, 8, 1), np.float32)})), f"{A}: its shape .* fit rank 2"),
    "no width": (weights(lambda w: w.update({A: np.ones((2, 0), np.float32)})), f"{A}: its shape .* fit rank 2"),
    "a whole weight": (weights(lambda w: w.update({"model.embed.weight": ONES})), "model.embed.weight: is no LoRA"),
    "embedding LoRA": (
        weights(lambda w: w.update({f"{NAME}.lora_embedding_A": ONES})),
        "lora_embedding_A: is no LoRA weight",
    ),
    "DoRA's magnitudes": (
        weights(lambda w: w.update({f"{NAME}.lora_magnitude_vector": ONES[0]})),
        "lora_magnitude_vector: is no LoRA weight",
    ),
    "names without PEFT's prefix": (
        weights(lambda w: [w.update({name.removeprefix("base_model.model."): w.pop(name)}) for name in (A, B)]),
        "is no LoRA weight",
    ),
    "module that is no target": (
        weights(lambda w: [w.update({name.replace("q_proj", "k_proj"): w[name]}) for name in (A, B)]),
        "k_proj.lora_A.weight: its module is not among the config's target_modules",
    ),
}


@pytest.mark.parametrize(("damage", "words"), CORRUPTED.values(), ids=CORRUPTED.keys())
def test_a_corrupted_bundle_is_refused_in_one_line(tmp_path: Path, damage: Damage, words: str) -> None:
    make(tmp_path / "b")
    damage(tmp_path / "b")
    with pytest.raises(AdapterError, match=words) as caught:
        verify_bundle(tmp_path / "b")
    assert len(str(caught.value).splitlines()) == 1


def test_a_pickle_in_a_bundle_never_runs(tmp_path: Path) -> None:
    make(tmp_path / "b")
    listed("adapter_model.bin")(tmp_path / "b")
    with pytest.raises(AdapterError):
        verify_bundle(tmp_path / "b")
    assert not Path(RAN).exists()
    pickle.loads(PICKLE)
    assert Path(RAN).exists(), "the pickle would have shown that it ran"
    Path(RAN).unlink()


def test_what_cannot_be_verified_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not fit rank 4"):
        make(tmp_path / "b", config={"r": 4})
    assert {path.name for path in tmp_path.iterdir()} == {"sources"}


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"use_dora": False, "modules_to_save": None, "rank_pattern": {}, "bias": "none"},
        {"target_modules": r".*\.q_proj"},
        {"target_modules": ["self_attn.q_proj", "v_proj"]},
        {"lora_dropout": 0.1, "layers_to_transform": [0], "exclude_modules": ["lm_head"]},
    ],
)
def test_settings_that_the_engine_follows_pass(tmp_path: Path, settings: dict[str, Any]) -> None:
    make(tmp_path / "b", config=settings)
    assert verify_bundle(tmp_path / "b").rank == 2


def test_the_config_that_peft_writes_passes(tmp_path: Path) -> None:
    from peft import LoraConfig

    written = LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, target_modules=["q_proj"]).to_dict()
    make(tmp_path / "b", config={**written, "target_modules": ["q_proj"]})
    assert verify_bundle(tmp_path / "b").target_modules == ("q_proj",)


def bfloat16(values: npt.NDArray[np.float32]) -> bytes:
    return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()


@pytest.mark.parametrize(
    ("value", "fault"), [(0.25, None), (np.nan, "holds NaN"), (np.inf, "holds NaN"), (0, "every lora_B is zero")]
)
def test_bfloat16_is_read_to_the_bit(tmp_path: Path, value: float, fault: str | None) -> None:
    make(tmp_path / "b")
    names = json.dumps(
        {
            A: {"dtype": "BF16", "shape": [2, 8], "data_offsets": [0, 32]},
            B: {"dtype": "BF16", "shape": [8, 2], "data_offsets": [32, 64]},
        }
    )
    names += " " * (-len(names) % 8)
    last = np.zeros(16, np.float32)
    last[15] = value
    data = struct.pack("<Q", len(names)) + names.encode() + bfloat16(np.ones(16, np.float32)) + bfloat16(last)
    raw_weights(lambda _: data)(tmp_path / "b")
    if fault is None:
        verify_bundle(tmp_path / "b")
    else:
        with pytest.raises(AdapterError, match=f"{fault}"):
            verify_bundle(tmp_path / "b")


MODULE = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("tensors", "fault"),
    [
        ({f"{MODULE}.weight": ("BF16", (8, 8))}, None),
        ({"model.language_model.layers.0.self_attn.q_proj.weight": ("F32", (8, 8))}, None),
        ({f"{MODULE}.weight": ("U8", (32, 1))}, None),
        ({f"{MODULE}.qweight": ("I32", (1, 8))}, None),
        ({f"{MODULE}.weight": ("F32", (8, 16))}, r"lora_A.weight: its shape \[2, 8\] does not fit .* \[8, 16\]"),
        ({f"{MODULE}.weight": ("F32", (4, 8))}, r"lora_B.weight: its shape \[8, 2\] does not fit .* \[4, 8\]"),
        ({"model.layers.0.mlp.up_proj.weight": ("F32", (8, 8))}, f"the base model has no module {MODULE}"),
        ({"model.layers.1.self_attn.q_proj.weight": ("F32", (8, 8))}, f"the base model has no module {MODULE}"),
    ],
)
def test_weights_must_fit_the_base(
    tmp_path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], fault: str | None
) -> None:
    make(tmp_path / "b")
    base = {name: TensorInfo(name, kind, shape, 0, 0) for name, (kind, shape) in tensors.items()}
    if fault is None:
        check_base(tmp_path / "b", base)
    else:
        with pytest.raises(AdapterError, match=f"{ADAPTER_WEIGHTS}: .*{fault}"):
            check_base(tmp_path / "b", base)


def test_a_head_that_shares_the_embedding_is_known(tmp_path: Path) -> None:
    head = "base_model.model.lm_head"
    made = {f"{head}.lora_A.weight": np.ones((2, 8), np.float32), f"{head}.lora_B.weight": np.ones((4, 2), np.float32)}
    make(tmp_path / "b", made, {"target_modules": ["lm_head"]})
    name = "model.embed_tokens.weight"
    check_base(tmp_path / "b", {name: TensorInfo(name, "F32", (4, 8), 0, 0)})


def test_base_tensors_come_from_the_headers(tmp_path: Path) -> None:
    save_file({"a.weight": np.zeros((2, 3), np.float32)}, tmp_path / "model-1.safetensors")
    save_file({"b.weight": np.zeros((4,), np.float16)}, tmp_path / "model-2.safetensors")
    found = base_tensors(tmp_path)
    assert {name: (tensor.kind, tensor.shape) for name, tensor in found.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.weight": ("F16", (4,)),
    }


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
