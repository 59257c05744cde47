"""What joins vLLM's own worker on CPU: an adapter's products once for all its tokens of a batch, and only for them.

vLLM 0.29 on CPU copies an adapter's two matrices for every token of every batch, so that tokens of adapters take more
than twice as long as the base model's; and tokens of the base model, whose slot is -1, get the last row's copy: in a
batch with any adapter they are answered by the one in the last slot. vLLM's kernels for GPUs do neither.
"""

from __future__ import annotations

from typing import Any

import torch

Group = tuple[int, torch.Tensor | None]
"""A slot, and the rows of a batch that it answers; None is all."""


class CpuWorker:
    """Named by vLLM's argument `worker_extension_cls`, so a worker has these methods."""

    def group_by_slot(self) -> None:
        """Mends this process's products; to be called before the first request."""
        from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

        mended: Any = PunicaWrapperCPU
        update, add_lora_linear = mended.update_metadata, mended.add_lora_linear

        def update_metadata(self: Any, *args: Any, **options: Any) -> None:
            update(self, *args, **options)
            self.token_groups = groups(self.token_lora_indices)
            self.sampled_groups = groups(self.sampler_indices)

        def add_lora_linear_of_groups(self: Any, *args: Any, **options: Any) -> None:
            if self.token_groups:
                add_lora_linear(self, *args, **options)

        mended.update_metadata, mended.add_lora_linear = update_metadata, add_lora_linear_of_groups
        mended._shrink_prefill = _shrink
        mended._expand_slice_prefill = _expand_slice
        mended._expand_prefill = _expand
        mended.add_lora_logits = _add_lora_logits


def groups(slots: torch.Tensor) -> list[Group]:
    """The slot of each row, -1 for none, of shape (rows,) -> the rows of each slot."""
    used = sorted(set(slots.tolist()))
    if len(used) == 1:
        return [(slot, None) for slot in used if slot >= 0]
    return [(slot, (slots == slot).nonzero().flatten()) for slot in used if slot >= 0]


def multiply(y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, of: list[Group], scale: float = 1.0) -> None:
    """Adds to the rows of each slot their product with its weights, in the type of `y`.

    Args:
        y: takes the sums; of shape (rows, out), where out may be less than the weights' for their padding.
        x: of shape (rows, in).
        weights: all slots', of shape (slots, 1, out, in).
        of: the slots that are in use; other rows of `y` stay as they are.
        scale: of the products.
    """
    for slot, rows in of:
        weight = weights[slot, 0, : y.shape[-1]].to(y.dtype)
        sums = y[:, : weight.shape[0]]
        if rows is None:
            sums.addmm_(x.to(y.dtype), weight.T, alpha=scale)
        else:
            sums.index_add_(0, rows, x[rows].to(y.dtype) @ weight.T, alpha=scale)


def _shrink(wrapper: Any, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, scale: float) -> None:
    multiply(y, x, weights, wrapper.token_groups, scale)


def _expand(wrapper: Any, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, _: bool) -> None:
    multiply(y, x, weights, wrapper.token_groups)


def _expand_slice(
    wrapper: Any, y: torch.Tensor, x: torch.Tensor, weights: torch.Tensor, offset: int, size: int, _: bool
) -> None:
    multiply(y[:, offset : offset + size], x, weights, wrapper.token_groups)


def _add_lora_logits(
    wrapper: Any, y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: float, **_: Any
) -> None:
    if wrapper.sampled_groups:
        hidden = torch.zeros(x.shape[0], up.shape[-1])
        multiply(hidden, x, down, wrapper.sampled_groups, scale)
        multiply(y, hidden, up, wrapper.sampled_groups)
