"""The adapter bundle: an immutable folder that holds a LoRA adapter and all that proves it fit to serve.

A bundle is what training hands to the registry and what a server loads. `adapter_config.json` and
`adapter_model.safetensors` are as PEFT and vLLM read them; `chat_template.jinja` is the template it was trained with;
`README.md`, where there is one, is its model card. `bundle.json` is the manifest: written last, it holds the hash of
every other file, so a folder without a matching manifest is not a bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from sft import lora
from sft.errors import AdapterError
from sft.lora import ADAPTER_CONFIG as ADAPTER_CONFIG
from sft.lora import ADAPTER_WEIGHTS as ADAPTER_WEIGHTS
from sft.lora import TensorInfo as TensorInfo

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""Names of runs, adapters and aliases: safe as a folder, an object key and a part of a model id."""

MANIFEST = "bundle.json"
TEMPLATE = "chat_template.jinja"
CARD = "README.md"
FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, TEMPLATE)
"""The files of a bundle beside its manifest, and the card where it has one: no others, so nothing in it can be code."""

HEX_DIGEST = r"^[0-9a-f]{64}$"

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

    sha256: str = Field(pattern=HEX_DIGEST)
    size: int = Field(ge=0)


class Golden(_Frozen):
    """A conversation and the exact prompt ids that training used for it (generation prompt included)."""

    messages: tuple[dict[str, str], ...] = Field(min_length=1)
    prompt_ids: tuple[int, ...] = Field(min_length=1)


class Bundle(_Frozen):
    """The manifest of an adapter bundle. Rule: `files` names exactly `FILES`, and `CARD` where there is a card."""

    format: Literal[1] = 1
    base_model: str
    base_fingerprint: str = Field(pattern=HEX_DIGEST)
    template_fingerprint: str = Field(pattern=HEX_DIGEST)
    rank: int = Field(gt=0)
    target_modules: tuple[str, ...]
    stop_ids: tuple[int, ...]
    golden: tuple[Golden, ...] = Field(min_length=1)
    lineage: dict[str, Any]
    files: dict[str, FileHash]

    @field_validator("files")
    @classmethod
    def _only_known_files(cls, files: dict[str, FileHash]) -> dict[str, FileHash]:
        odd = sorted((files.keys() - {CARD}) ^ set(FILES))
        if odd:
            raise ValueError(f"must name {', '.join(FILES)}, may name {CARD}, and no other; differs in {odd[0][:80]!r}")
        return files


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
    card: str | None = None,
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
        card: the model card, for people; nothing reads it.

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
        if card is not None:
            (work / CARD).write_text(card, encoding="utf-8")
        names = FILES if card is None else (*FILES, CARD)
        settings = lora.read_settings(work)
        bundle = Bundle(
            base_model=base_model,
            base_fingerprint=base_fingerprint,
            template_fingerprint=hashlib.sha256(template.encode()).hexdigest(),
            rank=settings.rank,
            target_modules=settings.target_modules,
            stop_ids=tuple(stop_ids),
            golden=tuple(golden),
            lineage=dict(lineage),
            files={name: hash_file(work / name) for name in names},
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
    config is of a LoRA which the engine serves as it was trained, and that the weights are readable safetensors of
    finite numbers, come in pairs of the stated rank on the stated modules, and are not all zero.

    Raises:
        AdapterError: one line that names the file, and the field or the tensor.
    """
    bundle = read_manifest(folder)
    expected = {*bundle.files, MANIFEST}
    present = {entry.name for entry in folder.iterdir()}
    for name in sorted(present ^ expected):
        state = "is missing" if name in expected else "is not in the manifest"
        raise AdapterError(f"{folder / name}: the file {state}")
    for name in sorted(expected):
        if (folder / name).is_symlink() or not (folder / name).is_file():
            raise AdapterError(f"{folder / name}: must be a plain file")
    for name, wanted in bundle.files.items():
        path = folder / name
        got = hash_file(path)
        if got != wanted:
            raise AdapterError(f"{path}: the file is not what the manifest says (size {got.size}, not {wanted.size})")
    settings = lora.read_settings(folder)
    if settings.rank != bundle.rank:
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: r: is {settings.rank}, but rank {bundle.rank} in the manifest")
    if settings.target_modules != bundle.target_modules:
        raise AdapterError(f"{folder / ADAPTER_CONFIG}: target_modules: are not those of the manifest")
    if bundle.files[TEMPLATE].sha256 != bundle.template_fingerprint:
        raise AdapterError(f"{folder / TEMPLATE}: the template is not the one that the manifest's fingerprint names")
    lora.check_weights(folder, settings)
    return bundle


def check_base(folder: Path, base: Mapping[str, TensorInfo]) -> None:
    """Proves that a verified bundle's weights fit a base model by name and shape; see `base_tensors`.

    Raises:
        AdapterError: one line that names the file and the tensor.
    """
    lora.check_shapes(folder, base)


def read_manifest(folder: Path) -> Bundle:
    """Reads a bundle's manifest without checking the files that it names.

    Raises:
        AdapterError: there is no readable manifest.
    """
    path = folder / MANIFEST
    try:
        return Bundle.model_validate_json(path.read_bytes())
    except OSError as error:
        reason = f"it has no {MANIFEST}" if not path.exists() else f"{MANIFEST} cannot be read ({error.strerror})"
        raise AdapterError(f"{folder} is no adapter bundle: {reason}") from None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise AdapterError(f"{path}: {field or 'manifest'}: {message}") from None


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
    heads = {}
    for shard in _shards(model):
        with shard.open("rb") as file:
            for tensor in lora.read_tensors(shard):
                file.seek(tensor.begin)
                head = file.read(min(256, tensor.end - tensor.begin))
                heads[tensor.name] = f"{tensor.name} {tensor.kind} {list(tensor.shape)}".encode() + head
    for name in sorted(heads):
        digest.update(heads[name])
    return digest.hexdigest()


def base_tensors(model: Path) -> dict[str, TensorInfo]:
    """Names, types and shapes of a base model's tensors, from its checkpoint's headers.

    Raises:
        AdapterError: the folder is not a checkpoint with safetensors weights.
    """
    return {tensor.name: tensor for shard in _shards(model) for tensor in lora.read_tensors(shard)}


def _shards(model: Path) -> list[Path]:
    found = sorted(model.glob("*.safetensors"))
    if not found:
        raise AdapterError(f"{model}: holds no .safetensors weights")
    return found
