"""What a preference stage measures against: the model as it was before the stage's first step.

The start of a fresh adapter is the base model itself. An adapter that goes on from another keeps a frozen copy of it
beside itself, under a name of its own. Both are there whole from the first step to the last, so what they say of a text
depends on nothing that a run could lose: neither on its step, nor on its number of workers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

REFERENCE = "reference"
"""Name of the frozen copy."""


def keep_start(model: PeftModel) -> None:
    """Keeps a frozen copy of the adapter `default` as it is now, without its dropout."""
    config = copy.deepcopy(model.peft_config["default"])
    config.lora_dropout = 0.0
    model.add_adapter(REFERENCE, config)
    for layer in _layers(model):
        for part in (layer.lora_A, layer.lora_B):
            part[REFERENCE].weight.data = part["default"].weight.detach().clone()
            part[REFERENCE].requires_grad_(False)
            part["default"].requires_grad_(True)


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Inside, the model is the reference: the frozen copy where there is one, else the base alone.

    PEFT's own ways to switch adapters switch what is trained, too, under DeepSpeed's hooks.
    """
    active: list[tuple[Any, Any]] = [(layer, layer._active_adapter) for layer in _layers(model)]
    try:
        for layer, _ in active:
            layer._active_adapter = [REFERENCE] if REFERENCE in layer.lora_A else []
        yield
    finally:
        for layer, before in active:
            layer._active_adapter = before


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, LoraLayer))
