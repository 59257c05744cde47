"""The base model with its LoRA adapter, and the module whose forward pass is the loss.

Adapter weights are float32 whatever the base's type: they are few, and small updates to bfloat16 weights are lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sft import loss
from sft.errors import ModelError
from sft.hardware import cpu_has_bfloat16

Dtype = Literal["auto", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A LoRA adapter's shape."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Literal["all-linear"] | Sequence[str]


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """How to load the base model; small, picklable, and the same on every worker."""

    base: Path
    base_id: str
    dtype: Dtype
    quantization: Literal["none", "nf4"]
    attention: str
    gradient_checkpointing: bool
    lora: LoraPlan


class LossModel(nn.Module):
    """Forward = sum of the cross-entropy over a micro-batch's trained tokens; logits only where they are needed.

    Without labels it is the model as a generator. That is done here as well, because ZeRO-3 follows the passes of the
    module that it wraps.
    """

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        weights: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Returns the cross-entropy sum, a float32 scalar; arguments as in `sft.batch.MicroBatch`.

        Without labels it takes the next tokens of one text and the cache of those before, which it fills, and returns
        the logits of what follows, shape (vocabulary,).
        """
        if labels is None:
            following = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits: Tensor = following.logits[0, -1]
            return logits
        wanted = loss.targets(labels)
        positions = loss.trained_positions(wanted)
        # use_cache=False is what isolates the documents of a packed row; see docs/training.md.
        output = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
            logits_to_keep=positions,
        )
        shifted = None if weights is None else loss.target_weights(weights)[:, positions]
        return loss.cross_entropy_sum(output.logits, wanted[:, positions], shifted)


def build_model(plan: ModelPlan, *, device: torch.device | str = "cpu") -> LossModel:
    """Loads the base, freezes it and adds a fresh adapter (A random by torch's current seed, B zero).

    Raises:
        ModelError: the base cannot be loaded, or no module fits `target_modules`.
    """
    dtype = resolve_dtype(plan.dtype, torch.device(device))
    extra: dict[str, Any] = {}
    if plan.quantization == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        extra["device_map"] = {"": device}
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            plan.base, dtype=dtype, attn_implementation=plan.attention, **extra
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{plan.base}: the base model cannot be loaded ({error})") from error
    if plan.quantization != "none":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    targets = plan.lora.target_modules
    try:
        model = get_peft_model(
            base,
            LoraConfig(
                task_type="CAUSAL_LM",
                r=plan.lora.rank,
                lora_alpha=plan.lora.alpha,
                lora_dropout=plan.lora.dropout,
                target_modules=targets if isinstance(targets, str) else list(targets),
            ),
        )
    except ValueError as error:
        raise ModelError(f"lora.target_modules {targets}: {error}") from error
    # PEFT writes the folder of this machine there, which says nothing to whoever loads the adapter.
    model.peft_config["default"].base_model_name_or_path = plan.base_id
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return LossModel(model)


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The base's type on a device; auto avoids bfloat16 where it would be emulated, many times slower."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under the names that PEFT gives them in an adapter file, in the model's order."""
    return {
        name.removeprefix("model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def peft_config(model: LossModel) -> dict[str, Any]:
    """The adapter's PEFT configuration as plain JSON values, ready for adapter_config.json."""
    config: dict[str, Any] = model.model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
