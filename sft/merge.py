"""Base + LoRA -> an ordinary Hugging Face checkpoint, for whoever serves without adapters.

The base's shards are read one after the other, tensor by tensor, so no more than one shard is ever held. What the
adapter adds is computed in float32 and rounded once, when a weight is written.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TEMPLATE,
    Bundle,
    base_fingerprint,
    base_tensors,
    check_base,
    verify_bundle,
)
from sft.errors import AdapterError, StorageError
from sft.lora import TensorInfo, read_tensors

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PREFIX = "base_model.model."
HEAD = "lm_head.weight"

Dtype = Literal["bfloat16", "float16", "float32"]
DTYPES: dict[Dtype, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

MERGED_KINDS = ("F32", "F16", "BF16")

_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".md"}
"""Endings of a base's files that are weights in another format, or say what is true of the base alone."""


@dataclass(frozen=True, slots=True)
class Update:
    """What an adapter does to one linear module's weight, of shape (out, in).

    `a` is (rank, in), `b` is (out, rank); `magnitude` (out) is there for DoRA alone.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    def applied(self, weight: Tensor) -> Tensor:
        """The merged weight, in float32."""
        merged: Tensor = torch.addmm(weight.float(), self.b.float(), self.a.float(), alpha=self.scale)
        if self.magnitude is None:
            return merged
        # DoRA: the rows keep the direction, and take their length from the magnitude.
        lengths: Tensor = self.magnitude.float() / torch.linalg.norm(merged, dim=1)
        return merged * lengths.unsqueeze(1)


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged checkpoint. Rule: `size` counts the bytes of its weights, `modules` those that the adapter changed."""

    folder: Path
    bundle: Bundle
    modules: int
    size: int


def merge(bundle: Path, base: Path, output: Path, dtype: Dtype | None = None) -> Merged:
    """Writes base + adapter as a checkpoint that needs no PEFT: whole, or not at all.

    It holds the base's config and tokenizer, the bundle's chat template, and the bundle's stop ids.

    Args:
        bundle: an adapter bundle.
        base: folder of the base model that it was trained on.
        output: where the checkpoint appears; must not exist, or be empty.
        dtype: type of the merged weights; None keeps each as the base has it.

    Raises:
        AdapterError: the bundle is damaged, or was trained on another base.
        StorageError: the output is there already, or cannot be written.
    """
    found = verify_bundle(bundle)
    print_of_base = base_fingerprint(base)
    if print_of_base != found.base_fingerprint:
        raise AdapterError(
            f"{bundle} was trained on {found.base_model} (fingerprint {found.base_fingerprint[:12]}), and {base} is "
            f"another base model ({print_of_base[:12]}); give --base the folder of the one that it was trained on"
        )
    check_base(bundle, base_tensors(base))
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise StorageError(f"{output}: is there already and not empty; choose another --output, or remove it")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        updates = read_updates(bundle)
        size = write_weights(base, updates, work, dtype)
        _write_files(base, work, bundle, found.stop_ids, dtype, untied="lm_head" in updates)
        os.chmod(work, 0o755)
        work.rename(output)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{output}: cannot be written ({error})") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return Merged(output, found, len(updates), size)


def read_updates(adapter: Path) -> dict[str, Update]:
    """Reads an adapter's weights and scale as PEFT writes them: LoRA, rsLoRA or DoRA of one rank and one alpha.

    Returns:
        Updates by the module's name in the model.
    """
    config = _read_json(adapter / ADAPTER_CONFIG)
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    updates = {}
    for name, a in tensors.items():
        module, side, _ = name.partition(".lora_A.weight")
        if side:
            named = f"{module}.lora_magnitude_vector"
            magnitude = tensors.get(named, tensors.get(f"{named}.weight"))
            b = tensors[f"{module}.lora_B.weight"]
            updates[module.removeprefix(PREFIX)] = Update(a, b, scale, magnitude)
    return updates


def write_weights(base: Path, updates: Mapping[str, Update], folder: Path, dtype: Dtype | None = None) -> int:
    """Writes the merged weights, in as many files as the base has, with an index where they are several.

    Args:
        base: folder of the base model.
        updates: what to change, by module.
        folder: where to write.
        dtype: type of the floating-point weights; None keeps each one's own.

    Returns:
        Bytes of all weights.

    Raises:
        AdapterError: a module's weight is not in the base, or is quantized.
        StorageError: the disk has not enough room.
    """
    shards = {shard: list(read_tensors(shard)) for shard in _weight_files(base)}
    headers = [tensor for tensors in shards.values() for tensor in tensors]
    _check_room(headers, folder, dtype)
    changes = _changes(base, updates, headers)
    index: dict[str, str] = {}
    total = 0
    for shard, tensors in shards.items():
        made: dict[str, Tensor] = {}
        with safe_open(shard, framework="pt") as opened:
            for tensor in tensors:
                weight: Tensor = opened.get_tensor(tensor.name)
                kind = DTYPES[dtype] if dtype and weight.is_floating_point() else weight.dtype
                for target, update in changes.get(tensor.name, {tensor.name: None}).items():
                    made[target] = (update.applied(weight) if update else weight).to(kind).contiguous()
        save_file(made, folder / shard.name, metadata={"format": "pt"})
        index |= dict.fromkeys(made, shard.name)
        total += sum(tensor.nbytes for tensor in made.values())
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(index.items()))})
    return total


def _weight_files(base: Path) -> list[Path]:
    """The files that transformers reads a checkpoint's weights from; a folder may hold copies in other layouts."""
    if (base / INDEX).is_file():
        names = set(_read_json(base / INDEX)["weight_map"].values())
        return [base / name for name in sorted(names)]
    if (base / SINGLE).is_file():
        return [base / SINGLE]
    raise AdapterError(f"{base}: holds neither {SINGLE} nor {INDEX}, so there are no weights to merge with")


def _changes(
    base: Path, updates: Mapping[str, Update], headers: Sequence[TensorInfo]
) -> dict[str, dict[str, Update | None]]:
    """By weight of the base: what is written in its place. A head that is tied becomes a weight of its own."""
    kinds = {tensor.name: tensor.kind for tensor in headers}
    found: dict[str, dict[str, Update | None]] = {}
    for module, update in updates.items():
        tail = f".{module[max(module.find('layers.'), 0) :]}.weight"
        names = [f"{module}.weight"] if f"{module}.weight" in kinds else [n for n in kinds if n.endswith(tail)]
        target = names[0] if names else HEAD
        if not names and module == "lm_head":
            names = [name for name in kinds if name.endswith("embed_tokens.weight")]
            found[names[0]] = {names[0]: None}
        if len(names) != 1 or kinds[names[0]] not in MERGED_KINDS:
            seen = ", ".join(f"{name} ({kinds[name]})" for name in names[:2]) or "none"
            raise AdapterError(
                f"{base}: module {module} needs one weight of type {', '.join(MERGED_KINDS)} in the base's files, "
                f"found {seen}; a quantized base cannot be merged: give the checkpoint that it was made of"
            )
        found.setdefault(names[0], {})[target] = update
    return found


def _check_room(headers: Sequence[TensorInfo], folder: Path, dtype: Dtype | None) -> None:
    needed = sum(
        math.prod(tensor.shape) * DTYPES[dtype].itemsize if dtype else tensor.end - tensor.begin for tensor in headers
    )
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder.parent}: the merged weights take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            f"make {(needed - free) / 1e9:.1f} GB of room, or choose another --output"
        )


def _write_files(
    base: Path, folder: Path, bundle: Path, stop_ids: Sequence[int], dtype: Dtype | None, *, untied: bool
) -> None:
    """Writes all but the weights: configs, tokenizer, chat template, licence."""
    for entry in base.iterdir():
        if entry.is_file() and entry.suffix not in _NOT_COPIED and not entry.name.endswith(".index.json"):
            shutil.copyfile(entry, folder / entry.name)
    config = _read_json(base / "config.json")
    if dtype:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if untied:
        config["tie_word_embeddings"] = False
    _write_json(folder / "config.json", config)
    generation = folder / "generation_config.json"
    kept = _read_json(generation) if generation.is_file() else {}
    _write_json(generation, {**kept, "eos_token_id": list(stop_ids)})
    template = (bundle / TEMPLATE).read_text(encoding="utf-8")
    (folder / TEMPLATE).write_text(template, encoding="utf-8")
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        _write_json(tokenizer, {**_read_json(tokenizer), "chat_template": template})


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
