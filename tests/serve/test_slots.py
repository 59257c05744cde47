from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.lora.layers.utils import LoRAMapping
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu

from serve.slots import CpuWorker

FIRST, LAST = 7, 9
"""Adapters in the first and the last of three slots."""


def change(*adapters: int) -> list[float]:
    """What the adapters of a batch's tokens add to them; 0 is a token of the base model's."""
    wrapper: Any = punica_cpu.PunicaWrapperCPU(8, 8, "cpu")
    wrapper.update_metadata(LoRAMapping(adapters, adapters, is_prefill=True), [FIRST, None, LAST], 4, 100)
    down = torch.tensor([1.0, 0.0, 10.0]).reshape(3, 1, 1, 1).expand(3, 1, 2, 4).contiguous()
    added = torch.zeros(len(adapters), 4)
    wrapper.add_lora_linear(added, torch.ones(len(adapters), 4), (down,), (torch.ones(3, 1, 4, 2),), 1.0, (4,))
    return added[:, 0].tolist()


def test_the_base_model_is_kept_apart_from_the_last_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lora_ops, punica_cpu):
        monkeypatch.setattr(module, "bgmv_shrink", lora_ops.bgmv_shrink)
    # Should this fail, vLLM has mended it, and CpuWorker may go.
    assert change(0, FIRST, 0, LAST) == [80.0, 8.0, 80.0, 80.0]
    CpuWorker().keep_base_apart()
    assert change(0, FIRST, 0, LAST) == [0.0, 8.0, 0.0, 80.0]
    assert change(0, 0) == [0.0, 0.0]
    assert change(LAST) == [80.0]
