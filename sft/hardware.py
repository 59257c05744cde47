"""What this machine multiplies natively."""

from __future__ import annotations

import torch


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; others emulate it, about ten times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
