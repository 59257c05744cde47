"""Attention over the branches of a trie, for CPUs: a document attends to itself and to nothing else.

Where a GPU has attention kernels for documents of many lengths, a CPU's kernel computes the whole square of a pack,
and takes a mask to throw most of it away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from sft.trie import Branch, Trie, make_trie

ATTENTION = "raysft_branches"
PROVEN = ("llama", "mistral", "qwen2", "qwen3")
"""Architectures whose layers hand further arguments on to the attention function; the tests prove each."""


def use_branches(model: Any) -> bool:
    """Switches a model's attention to branches if it runs on a CPU and is known to work so; says whether it does."""
    config = model.config
    if config.model_type not in PROVEN or config._attn_implementation != "sdpa" or model.device.type != "cpu":
        return False
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []) or (
        getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None) is not None
    ):
        return False
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)
    return True


def trie_of(input_ids: Tensor, wanted: Tensor, position_ids: Tensor, attention_mask: Tensor | None) -> Trie:
    """The trie of a micro-batch; arguments as in `sft.batch.MicroBatch`, with targets for labels."""
    rows, width = input_ids.shape
    if attention_mask is None:
        starts = (position_ids.flatten() == 0).nonzero().flatten().tolist()
        ends = [*starts[1:], rows * width]
    else:
        starts = list(range(0, rows * width, width))
        ends = [start + length for start, length in zip(starts, attention_mask.sum(1).tolist(), strict=True)]
    return make_trie(input_ids.flatten(), wanted.flatten(), starts, ends)


def branch_inputs(trie: Trie) -> dict[str, Any]:
    """Arguments of a model's forward pass that say who sees whom."""
    # A mask of four dimensions is taken for a finished one; the attention below does not look at it.
    return {"attention_mask": torch.empty(1, 1, 0, 0), "branches": trie.branches}


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    branches: Sequence[Branch] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if branches is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return plain
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for branch in branches:
        keys, values = (_along(tensor, branch) for tensor in (key, value))
        outputs.append(
            functional.scaled_dot_product_attention(
                query[:, :, branch.first : branch.last],
                repeat_kv(keys, groups),
                repeat_kv(values, groups),
                attn_mask=branch.mask,
                dropout_p=options.get("dropout", 0.0),
                is_causal=branch.mask is None,
                scale=options.get("scaling"),
            ).transpose(1, 2)
        )
    return torch.cat(outputs, 1), None


def _along(tensor: Tensor, branch: Branch) -> Tensor:
    if branch.mask is None:
        return tensor[:, :, branch.first : branch.last]
    return tensor.index_select(2, branch.path)
