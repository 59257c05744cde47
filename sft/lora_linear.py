"""The forward and backward pass of a linear layer with a LoRA adapter, in as few products and passes as it takes.

PEFT composes it of separate operations: three products, a scaling and an addition of the whole output forward, as many
back, each with a result in memory. Here the thin products add into the wide one's result, and what is kept for the
backward pass is the layer's input and its projection to the rank.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's LoRA layer, computed at once where it is a plain one; PEFT's own way where it is anything else."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns base(x) + scale * B(A(x)), shape (..., out)."""
        plain = self._plain() if not args and not kwargs else None
        if plain is None:
            made: Tensor = super().forward(x, *args, **kwargs)
            return made
        down, up, scale = plain
        base = self.get_base_layer()
        output: Tensor = _Product.apply(x, base.weight, base.bias, down, up, scale)  # type: ignore[no-untyped-call]
        return output

    def _plain(self) -> tuple[Tensor, Tensor, float] | None:
        """A, B and the scale of the one active adapter; None where there is more to it than these."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        if name not in self.lora_A or name in self.lora_variant or type(self.get_base_layer()) is not nn.Linear:
            return None
        down, up = self.lora_A[name], self.lora_B[name]
        # Weights that ZeRO-3 has sharded come together only in the forward pass of their own module.
        if hasattr(down.weight, "ds_id") or up.bias is not None or not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        return down.weight, up.weight, float(self.scaling[name])


def fuse_lora(model: nn.Module) -> None:
    """Makes every plain LoRA layer of PEFT's a `LoraLinear`, in place; names and parameters stay as they are."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = LoraLinear


class _Product(torch.autograd.Function):
    """x W' + bias + scale * (x A') B', for a frozen W; products are in the type of x, gradients in their weights'."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        down_like, up_like = down.to(x.dtype), up.to(x.dtype)
        inner = rows @ down_like.T
        output = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
        output.addmm_(inner, up_like.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale = scale
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, inner, weight, down, up = ctx.saved_tensors
        back = gradient.reshape(-1, gradient.shape[-1])
        of_inner = (back @ up.to(back.dtype)).mul_(ctx.scale)
        of_up = (back.T @ inner).mul_(ctx.scale).to(up.dtype)
        of_down = (of_inner.T @ rows).to(down.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (back @ weight).addmm_(of_inner, down.to(back.dtype)).view(*gradient.shape[:-1], -1)
        return of_x, None, None, of_down, of_up, None
