"""What this machine multiplies natively, and how much memory this process took."""

from __future__ import annotations

import torch


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16; others emulate it, about ten times slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has held so far, in bytes: of its GPU where it has one, else of the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    with open("/proc/self/status", encoding="ascii") as status:  # getrusage would tell a parent's peak as well
        held = next(line for line in status if line.startswith("VmHWM:"))
    return int(held.split()[1]) * 1024
