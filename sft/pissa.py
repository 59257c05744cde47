"""PiSSA: an adapter that begins as the base weights' largest singular directions (Meng et al. 2024).

The usual way takes the start B0 A0 out of the base's weights, which rounds them and leaves an adapter that only fits
that changed base. Here the base stays as it is and a second, frozen adapter takes the start away again:

    W x + s B A x - s B0 A0 x

Both together are one plain LoRA of twice the rank on the base that everybody has, [A; A0] and [B, -B0], and that is
what checkpoints and bundles hold.
"""

from __future__ import annotations

import copy

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sft.errors import ModelError

START = "start"
"""Name of the frozen adapter."""


def start(model: PeftModel, init: str, device: torch.device | str) -> None:
    """Gives a fresh adapter its PiSSA start and adds the frozen one.

    Args:
        model: with the adapter `default`.
        init: `pissa`, or `pissa_niter_N` for an approximation in N rounds by torch's current seed.
        device: where to decompose; a full decomposition of a 7B model's weights takes long on a CPU.

    Raises:
        ModelError: a module is too small for the rank.
    """
    config = model.peft_config["default"]
    frozen = copy.deepcopy(config)
    frozen.lora_dropout = 0.0
    model.add_adapter(START, frozen)
    model.base_model.set_adapter(["default", START])
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            weight = layer.get_base_layer().weight
            if min(weight.shape) < config.r:
                raise ModelError(
                    f"lora.init {init} cannot take {config.r} directions out of {name}, whose weight is "
                    f"{list(weight.shape)}: lower lora.rank, or leave the module out of lora.target_modules"
                )
            whole = weight.detach().to(device, torch.float32)
            a, b = _principal(whole.T if layer.fan_in_fan_out else whole, config.r, init, layer.scaling["default"])
            for adapter, sign in (("default", 1), (START, -1)):
                layer.lora_A[adapter].weight.data = a.to(weight.device, copy=True)
                layer.lora_B[adapter].weight.data = (sign * b).to(weight.device, copy=True)
                layer.lora_A[adapter].requires_grad_(sign == 1)
                layer.lora_B[adapter].requires_grad_(sign == 1)


def frozen_start(model: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen adapter's weights by the names of the trained ones that they go with; none without PiSSA."""
    return {
        name.removeprefix("model.").replace(f".{START}.", "."): parameter
        for name, parameter in model.named_parameters()
        if f".{START}." in name
    }


def joined(name: str, trained: Tensor, frozen: Tensor) -> Tensor:
    """Both adapters' A or B as one."""
    return torch.cat([trained, frozen], dim=_rank_axis(name))


def parted(name: str, both: Tensor) -> tuple[Tensor, Tensor]:
    """Undoes `joined`."""
    trained, frozen = both.chunk(2, dim=_rank_axis(name))
    return trained, frozen


def _rank_axis(name: str) -> int:
    return 0 if ".lora_A." in name else 1


def _principal(weight: Tensor, rank: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    """A and B whose scaled product is the weight's best (or nearly best) approximation of that rank."""
    if init == "pissa":
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        left, sizes, right = left[:, :rank], sizes[:rank], right[:rank]
    else:
        left, sizes, right = torch.svd_lowrank(weight, q=rank, niter=int(init.rpartition("_")[2]))
        right = right.T
    roots = (sizes / scale).sqrt()
    return (roots[:, None] * right).contiguous(), (left * roots).contiguous()
