"""The two files of a LoRA adapter, as PEFT writes them: what a server can make of them, and what not.

PEFT knows many variants that vLLM reads without a word and serves wrongly: it scales every module by one rank and one
alpha, and knows no other parameters than the pairs A and B. So a setting that changes what the adapter computes must
be at rest here, and every number is looked at.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from sft.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
    "use_rslora",
}
"""Settings that may have any value: they matter in training only, or the engine follows them (use_rslora)."""

_CHECKED = {"peft_type", "r", "lora_alpha", "target_modules", "init_lora_weights"}
_AT_REST = {"null", "false", '"none"', "{}", "[]"}
_PLAIN_STARTS: tuple[object, ...] = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin that leave the base's weights as they are; others (pissa, olora, loftq and so on) move them."""

_UNPACKED = {"F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_TENSOR = re.compile(r"base_model\.model\.(?P<module>[\w.-]+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True, slots=True)
class _Kind:
    """A type of numbers: its width, and the bits of sign and exponent. NaN and infinity have all exponent bits set."""

    bits: type[np.unsignedinteger[Any]]
    sign: int
    exponent: int


_KINDS = {
    "F32": _Kind(np.uint32, 1 << 31, 0x7F800000),
    "F16": _Kind(np.uint16, 1 << 15, 0x7C00),
    "BF16": _Kind(np.uint16, 1 << 15, 0x7F80),
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What an adapter's config says of its shape. `target_modules` is a single pattern where PEFT was given one."""

    rank: int
    target_modules: tuple[str, ...]
    is_pattern: bool

    def covers(self, module: str) -> bool:
        """Whether a module, by its full name, is among the targets."""
        if self.is_pattern:
            return re.fullmatch(self.target_modules[0], module) is not None
        return any(module == target or module.endswith(f".{target}") for target in self.target_modules)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as a safetensors header describes it; `begin` and `end` are bytes from the start of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_settings(folder: Path) -> LoraSettings:
    """Reads an adapter's config and refuses what the engine would not serve as it was trained.

    Raises:
        AdapterError: one line that names the file and the field.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: not a PEFT LoRA configuration, which is a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type: is {_shown(config.get('peft_type'))}; only LORA can be served")
    for key in sorted(config.keys() - _FREE - _CHECKED):
        if json.dumps(config[key]) not in _AT_REST:
            raise AdapterError(
                f"{path}: {key}: is {_shown(config[key])}, which the engine does not serve; train a plain LoRA"
            )
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        start = _shown(config["init_lora_weights"])
        raise AdapterError(f"{path}: init_lora_weights: is {start}, which changes the base's weights; train without it")
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if type(rank) is not int or rank <= 0:
        raise AdapterError(f"{path}: r: is {_shown(rank)}; must be a positive integer")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise AdapterError(f"{path}: lora_alpha: is {_shown(alpha)}; must be a positive number")
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise AdapterError(f"{path}: target_modules: is {_shown(targets)}; must be names of modules")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            raise AdapterError(f"{path}: target_modules: is no pattern ({error})") from None
    return LoraSettings(rank, tuple(sorted(names)), isinstance(targets, str))


def check_weights(folder: Path, settings: LoraSettings) -> None:
    """Proves that the weights are finite LoRA pairs of the stated rank on the stated modules, and not all zero.

    Raises:
        AdapterError: one line that names the file and the tensor.
    """
    path = folder / ADAPTER_WEIGHTS
    tensors = {tensor.name: tensor for tensor in read_tensors(path)}
    if not tensors:
        raise AdapterError(f"{path}: holds no weights")
    for tensor in tensors.values():
        _check_tensor(path, tensor, tensors, settings)
    data = np.memmap(path, np.uint8, mode="r")
    moved = False
    for tensor in tensors.values():
        kind = _KINDS[tensor.kind]
        # A copy of one tensor at a time: data in the file need not be aligned.
        bits: npt.NDArray[Any] = np.frombuffer(data[tensor.begin : tensor.end].tobytes(), kind.bits)
        if ((bits & kind.exponent) == kind.exponent).any():
            raise AdapterError(f"{path}: {tensor.name}: holds NaN or infinite numbers")
        moved = moved or (".lora_B." in tensor.name and bool((bits & ~np.array(kind.sign, kind.bits)).any()))
    if not moved:
        raise AdapterError(f"{path}: every lora_B is zero, so the adapter would change nothing")


def check_shapes(folder: Path, base: Mapping[str, TensorInfo]) -> None:
    """Proves that every pair fits a weight of the base model.

    Args:
        folder: a verified bundle.
        base: the base model's tensors by name, as in its checkpoint.

    Raises:
        AdapterError: one line that names the file and the tensor.
    """
    path = folder / ADAPTER_WEIGHTS
    modules = _modules(base)
    for tensor in read_tensors(path):
        found = _TENSOR.fullmatch(tensor.name)
        assert found, "the bundle was verified"
        named = modules.get(found["module"]) or modules.get(_tail(found["module"]))
        if not named:
            raise AdapterError(f"{path}: {tensor.name}: the base model has no module {found['module']}")
        # A quantized checkpoint packs its weights, so their shapes tell nothing.
        weights = [weight for weight in (base.get(f"{name}.weight") for name in named) if weight]
        if not weights or any(weight.kind not in _UNPACKED or len(weight.shape) != 2 for weight in weights):
            continue
        axis = 1 if found["side"] == "A" else 0
        if tensor.shape[axis] not in {weight.shape[axis] for weight in weights}:
            raise AdapterError(
                f"{path}: {tensor.name}: its shape {list(tensor.shape)} does not fit the base model's "
                f"{named[0]}.weight {list(weights[0].shape)}"
            )


def read_tensors(path: Path) -> Iterator[TensorInfo]:
    """Yields what a safetensors file's header says of its tensors.

    Raises:
        AdapterError: the file is not whole, or no safetensors file.
    """
    try:
        with safe_open(path, framework="np"):
            pass  # this checks the header against the file's length, and the tensors against each other
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise AdapterError(f"{path}: not readable as safetensors ({error})") from None
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + size + offset for offset in entry["data_offsets"])
            yield TensorInfo(name, entry["dtype"], tuple(entry["shape"]), begin, end)


def _check_tensor(path: Path, tensor: TensorInfo, tensors: Mapping[str, TensorInfo], settings: LoraSettings) -> None:
    found = _TENSOR.fullmatch(tensor.name)
    if not found:
        raise AdapterError(
            f"{path}: {tensor.name}: is no LoRA weight (base_model.model.MODULE.lora_A.weight or lora_B)"
        )
    if tensor.kind not in _KINDS:
        raise AdapterError(f"{path}: {tensor.name}: its type is {tensor.kind}; allowed: {', '.join(_KINDS)}")
    side = found["side"]
    other = f"base_model.model.{found['module']}.lora_{'B' if side == 'A' else 'A'}.weight"
    if other not in tensors:
        raise AdapterError(f"{path}: {tensor.name}: has no partner {other}")
    shape = tensor.shape
    if len(shape) != 2 or math.prod(shape) == 0 or shape[0 if side == "A" else 1] != settings.rank:
        raise AdapterError(f"{path}: {tensor.name}: its shape {list(shape)} does not fit rank {settings.rank}")
    if not settings.covers(found["module"]):
        raise AdapterError(f"{path}: {tensor.name}: its module is not among the config's target_modules")


def _modules(base: Mapping[str, TensorInfo]) -> dict[str, list[str]]:
    """The base's modules by full name, and by what follows their place in the model, which checkpoints name freely."""
    names = sorted({name.rpartition(".")[0] for name in base})
    found: dict[str, list[str]] = {name: [name] for name in names}
    for name in names:
        found.setdefault(_tail(name), []).append(name)
    # A head that shares the embedding's weight has none of its own in a checkpoint.
    found.setdefault("lm_head", [name for name in names if name.endswith("embed_tokens")])
    return found


def _tail(module: str) -> str:
    """A module's name from its layers on: `layers.0.mlp.up_proj` of `model.language_model.layers.0.mlp.up_proj`."""
    return module[max(module.find("layers."), 0) :]


def _shown(value: object) -> str:
    """A value of a config as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
