"""The adapter bundle: an immutable folder that holds a LoRA adapter and all that proves it fit to serve.

A bundle is what training hands to the registry and what a server loads. `adapter_config.json` and
`adapter_model.safetensors` are as PEFT and vLLM read them; `chat_template.jinja` is the template it was trained with;
`bundle.json` is the manifest: written last, it holds the hash of every other file, so a folder without a matching
manifest is not a bundle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from sft.errors import AdapterError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Names of runs, adapters and aliases: safe as a folder, an object key and a part of a model id."""

MANIFEST = "bundle.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TEMPLATE = "chat_template.jinja"

GOLDEN_MESSAGES: tuple[tuple[dict[str, str], ...], ...] = (
    ({"role": "user", "content": "Hello!"},),
    (
        {"role": "system", "content": "Answer in one sentence."},
        {"role": "user", "content": "Why is the sky blue?\n\n  (two spaces, a tab\tand an ümlaut)"},
    ),
    (
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Naïve café 漢字 🙂, and <b>markup</b>?"},
    ),
)
"""Conversations that every bundle carries with their prompt ids: made up, so that no one's data travels with it."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileHash(_Frozen):
    """What a manifest says of one file."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Golden(_Frozen):
    """A conversation and the exact prompt ids that training used for it (generation prompt included)."""

    messages: tuple[dict[str, str], ...]
    prompt_ids: tuple[int, ...]


class Bundle(_Frozen):
    """The manifest of an adapter bundle."""

    format: int = 1
    base_model: str
    base_fingerprint: str
    template_fingerprint: str
    rank: int = Field(gt=0)
    target_modules: tuple[str, ...]
    stop_ids: tuple[int, ...]
    golden: tuple[Golden, ...]
    lineage: dict[str, Any]
    files: dict[str, FileHash]


def write_bundle(
    folder: Path,
    *,
    weights: Path,
    peft_config: Path,
    template: str,
    base_model: str,
    base_fingerprint: str,
    stop_ids: Sequence[int],
    golden: Iterable[Golden],
    lineage: Mapping[str, Any],
) -> Bundle:
    """Writes a bundle: whole, or not at all.

    Args:
        folder: where the bundle appears; must not exist.
        weights: the adapter's safetensors file.
        peft_config: the adapter's PEFT configuration.
        template: the chat template that training used.
        base_model: the base model's id, as users know it.
        base_fingerprint: see `base_fingerprint`.
        stop_ids: the token ids that end a turn.
        golden: conversations with their exact prompt ids.
        lineage: data fingerprint, config and metrics of the run.

    Raises:
        AdapterError: the folder exists, or what was given does not make a valid bundle.
    """
    if folder.exists():
        raise AdapterError(f"{folder} exists already; a bundle is never overwritten")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copyfile(weights, work / ADAPTER_WEIGHTS)
        shutil.copyfile(peft_config, work / ADAPTER_CONFIG)
        (work / TEMPLATE).write_text(template, encoding="utf-8")
        settings = _peft_settings(work)
        bundle = Bundle(
            base_model=base_model,
            base_fingerprint=base_fingerprint,
            template_fingerprint=hashlib.sha256(template.encode()).hexdigest(),
            rank=settings[0],
            target_modules=settings[1],
            stop_ids=tuple(stop_ids),
            golden=tuple(golden),
            lineage=dict(lineage),
            files={name: hash_file(work / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE)},
        )
        (work / MANIFEST).write_text(bundle.model_dump_json(indent=1), encoding="utf-8")
        verify_bundle(work)
        os.chmod(work, 0o755)
        work.rename(folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return bundle


def verify_bundle(folder: Path) -> Bundle:
    """Reads a bundle and proves that it is whole and sound.

    Checks that there is nothing but the manifest's files (plain files, no links), their hashes and sizes, that the
    weights are readable safetensors of finite numbers, come in LoRA pairs of the stated rank on the stated modules,
    and are not all zero.

    Raises:
        AdapterError: one line that names the file and what is wrong with it.
    """
    bundle = read_manifest(folder)
    expected = {*bundle.files, MANIFEST}
    present = {entry.name for entry in folder.iterdir()}
    for name in sorted(present ^ expected):
        state = "is missing" if name in expected else "is not in the manifest"
        raise AdapterError(f"{folder / name}: the file {state}")
    for name, wanted in bundle.files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise AdapterError(f"{path}: must be a plain file")
        got = hash_file(path)
        if got != wanted:
            raise AdapterError(f"{path}: the file is not what the manifest says (size {got.size}, not {wanted.size})")
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE):
        if name not in bundle.files:
            raise AdapterError(f"{folder / MANIFEST}: the manifest does not list {name}")
    if _peft_settings(folder) != (bundle.rank, bundle.target_modules):
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: rank or target_modules differ from the manifest")
    if bundle.files[TEMPLATE].sha256 != bundle.template_fingerprint:
        raise AdapterError(f"{folder / TEMPLATE}: the template is not the one that the manifest's fingerprint names")
    _check_weights(folder / ADAPTER_WEIGHTS, bundle.rank)
    return bundle


def read_manifest(folder: Path) -> Bundle:
    """Reads a bundle's manifest without checking the files that it names.

    Raises:
        AdapterError: there is no readable manifest.
    """
    path = folder / MANIFEST
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise AdapterError(f"{folder} is no adapter bundle: it has no {MANIFEST}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise AdapterError(f"{path}: {field or 'manifest'}: {first['msg']}") from None


def hash_file(path: Path) -> FileHash:
    """SHA-256 and size of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return FileHash(sha256=digest.hexdigest(), size=file.tell())


def base_fingerprint(model: Path) -> str:
    """Fingerprint of a base model on disk, equal wherever the same weights and tokenizer lie.

    Covers the architecture (`config.json` without bookkeeping fields), the tokenizer file, and every weight's name,
    type and shape with the first bytes of its data: enough to tell two fine-tunes of one model apart in milliseconds
    without reading the weights through.

    Raises:
        AdapterError: the folder is not a checkpoint with safetensors weights.
    """
    digest = hashlib.sha256()
    try:
        config = json.loads((model / "config.json").read_bytes())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{model / 'config.json'}: cannot be read: {error}") from None
    for noise in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        config.pop(noise, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    tokenizer = model / "tokenizer.json"
    if tokenizer.is_file():
        digest.update(tokenizer.read_bytes())
    shards = sorted(model.glob("*.safetensors"))
    if not shards:
        raise AdapterError(f"{model}: holds no .safetensors weights")
    tensors = sorted((entry for shard in shards for entry in _tensor_heads(shard)), key=lambda entry: entry[0])
    for name, kind, shape, head in tensors:
        digest.update(f"{name} {kind} {shape}".encode() + head)
    return digest.hexdigest()


def _tensor_heads(shard: Path, length: int = 256) -> Iterable[tuple[str, str, list[int], bytes]]:
    """Yields (name, dtype, shape, first bytes) of every tensor, straight from the file's header."""
    with shard.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            file.seek(8 + size + begin)
            yield name, entry["dtype"], entry["shape"], file.read(min(length, end - begin))


def _peft_settings(folder: Path) -> tuple[int, tuple[str, ...]]:
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_bytes())
        if config["peft_type"] != "LORA":
            raise AdapterError(f"{path}: peft_type is {config['peft_type']!r}; only LORA can be served")
        modules = config["target_modules"]
        return int(config["r"]), tuple(sorted([modules] if isinstance(modules, str) else modules))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: not a PEFT LoRA configuration ({type(error).__name__}: {error})") from None


def _check_weights(path: Path, rank: int) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    moved = False
    try:
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                tensor = np.asarray(file.get_tensor(name))
                shapes[name] = tensor.shape
                if not np.isfinite(tensor.astype(np.float32)).all():
                    raise AdapterError(f"{path}: {name} holds NaN or infinite numbers")
                moved = moved or (".lora_B." in name and bool(np.any(tensor)))
    except (SafetensorError, OSError, TypeError) as error:
        raise AdapterError(f"{path}: not readable as safetensors ({error})") from None
    if not shapes:
        raise AdapterError(f"{path}: holds no weights")
    for name, shape in shapes.items():
        if ".lora_A." not in name and ".lora_B." not in name:
            raise AdapterError(f"{path}: {name} is no LoRA weight")
        other = name.replace(".lora_A.", ".lora_B.") if ".lora_A." in name else name.replace(".lora_B.", ".lora_A.")
        if other not in shapes:
            raise AdapterError(f"{path}: {name} has no partner {other}")
        got = shape[0] if ".lora_A." in name else shape[-1]
        if len(shape) != 2 or got != rank or math.prod(shape) == 0:
            raise AdapterError(f"{path}: {name} has shape {list(shape)}, which does not fit rank {rank}")
    if not moved:
        raise AdapterError(f"{path}: every lora_B is zero, so the adapter would change nothing")
