"""How much a LoRA step has to compute, and how fast this machine multiplies: together, the bound."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.batch import WorkerBatch
    from sft.mask import Example

BEST_OF = 3


def packed_batches(
    steps: Iterable[Sequence[Sequence[Example]]], count: int, *, micro_batch_size: int, accumulation: int
) -> Iterator[WorkerBatch]:
    """The batches of a lone worker: the packs of each step, of `count` steps in all."""
    from sft.batch import worker_batch

    for number, step in enumerate(steps):
        yield worker_batch(
            step,
            epoch=0,
            step=number,
            before=number / count,
            after=(number + 1) / count,
            rank=0,
            workers=1,
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            layout="packed",
            pad_id=0,
        )


def matrix_rate(threads: int, device: str = "cpu") -> dict[str, float]:
    """Measures square matrix products.

    Returns:
        GFLOP/s by type of number, the best of a few goes.
    """
    import torch

    torch.set_num_threads(threads)
    size = 8192 if device == "cuda" else 2048
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        # bfloat16 that a CPU only emulates takes many times longer.
        side = size if device == "cuda" or dtype == torch.float32 else size // 2
        one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(BEST_OF + 1):
            begin = time.perf_counter()
            product = one @ other
            if device == "cuda":
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begin)
        assert product.shape == one.shape
        rates[str(dtype).removeprefix("torch.")] = 2 * side**3 / best / 1e9
    return rates


def flop_per_token(base: Path, trained_share: float) -> tuple[float, str]:
    """What a LoRA step of a checkpoint's model must compute for a token, and in which type of number here.

    See `flop_of`.
    """
    import torch
    from transformers import AutoConfig

    from sft.model import resolve_dtype

    config: Any = AutoConfig.from_pretrained(base)
    return flop_of(config, trained_share), str(resolve_dtype("auto", torch.device("cpu"))).removeprefix("torch.")


def flop_of(config: Any, trained_share: float) -> float:
    """What a LoRA step must compute for a token: frozen weights take 2 FLOP a parameter forward and 2 back to the
    activations, the output head only where a token is trained. The adapter itself, attention scores and everything
    that is no matrix product are left out: they are the method's cost, not the task's.

    Args:
        config: a transformers config of a Llama-like model.
        trained_share: share of the tokens that are trained.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    layer = hidden * (2 * queries + 2 * keys) + 3 * hidden * inner
    return 4.0 * float(layer * config.num_hidden_layers + trained_share * hidden * config.vocab_size)
