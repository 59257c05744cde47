"""The base model, with or without a LoRA adapter, and the module whose forward pass is the loss.

Trained weights are float32 whatever the base's type: small updates to bfloat16 weights are lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sft import loss, pissa
from sft.branches import branch_inputs, trie_of, use_branches
from sft.errors import ModelError
from sft.hardware import cpu_has_bfloat16
from sft.head import LossHead, fit_head
from sft.lora_linear import fuse_lora
from sft.mask import UNTRAINED
from sft.neftune import noise
from sft.reference import keep_start

Dtype = Literal["auto", "bfloat16", "float32"]

_TRAINED = re.compile(r".*\.(lora_[AB]\.default\.weight|lora_magnitude_vector\.default\.weight)")


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """A LoRA adapter's shape and start; see `sft.config.LoraSection`."""

    rank: int
    alpha: float
    dropout: float
    target_modules: Literal["all-linear"] | Sequence[str]
    rslora: bool = False
    dora: bool = False
    init: str = "default"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """How to load the base model, and what of it is trained; small, picklable, and the same on every worker.

    Rule: with method full, `lora` is not read. With `reference` a start other than the base is kept beside the adapter,
    for a preference stage.
    """

    base: Path
    base_id: str
    dtype: Dtype
    quantization: Literal["none", "nf4"]
    attention: str
    gradient_checkpointing: bool
    lora: LoraPlan
    method: Literal["lora", "full"] = "lora"
    neftune_alpha: float = 0.0
    reference: bool = False


class LossModel(nn.Module):
    """Forward = sum of the cross-entropy over a micro-batch's trained tokens; logits only where they are needed.

    Without labels it is the model as a generator. That is done here as well, because ZeRO-3 follows the passes of the
    module that it wraps.

    Args:
        model: a causal language model, or a `PeftModel` around one.
        autocast: type to compute in where it is not the weights' own.
        neftune_alpha: strength of the noise on the embeddings in training; 0 for none.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None = None, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.noise_seed = 0
        """Seed of the noise; the training loop sets it for each step."""
        self._autocast = autocast
        self._alpha = neftune_alpha
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        # Dropout and noise draw anew for every token, so under them no two documents have a beginning in common.
        self._branches = not neftune_alpha and not _drops(model) and use_branches(base)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        weights: Tensor | None = None,
        cache: Any = None,
        by_row: bool = False,
    ) -> Tensor:
        """Returns the cross-entropy sum, a float32 scalar; arguments as in `sft.batch.MicroBatch`.

        With `by_row` it is the sum of each row, shape (rows,), without weights and with a frozen output layer.
        Without labels it takes the next tokens of one text and the cache of those before, which it fills, and returns
        the logits of what follows, shape (vocabulary,).
        """
        if labels is None:
            with self._precision(input_ids.device.type):
                following = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            next_logits: Tensor = following.logits[0, -1]
            return next_logits
        assert position_ids is not None  # labels come with their positions
        wanted = by_label = loss.targets(labels)
        shifted = None if weights is None else loss.target_weights(weights)
        with self._precision(input_ids.device.type):
            extra: dict[str, Any] = {"attention_mask": attention_mask}
            if self._branches:
                trie = trie_of(input_ids, wanted, position_ids, attention_mask)
                input_ids, wanted, position_ids = (
                    tensor.flatten()[trie.tokens][None] for tensor in (input_ids, wanted, position_ids)
                )
                shifted = None if shifted is None else shifted.flatten()[trie.tokens][None]
                extra = branch_inputs(trie)
            # use_cache=False is what isolates the documents of a packed row; see docs/training.md.
            inputs = {
                **self._inputs(input_ids, position_ids, attention_mask),
                "position_ids": position_ids,
                "use_cache": False,
                **extra,
            }
            causal = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
            head = causal.get_output_embeddings()
            if isinstance(head, LossHead):
                trained = (wanted != UNTRAINED).flatten()
                hidden = causal.base_model(**inputs).last_hidden_state.flatten(0, 1)[trained]
                parts = None if shifted is None else shifted.flatten()[trained]
                found: Tensor = head(hidden, wanted.flatten()[trained], parts, each=by_row)
                return loss.row_sums(found, by_label) if by_row else found
            positions = loss.trained_positions(wanted)
            logits = self.model(**inputs, logits_to_keep=positions).logits
        if by_row:
            kept = wanted[:, positions].flatten()
            trained = kept != UNTRAINED
            return loss.row_sums(loss.cross_entropies(logits.flatten(0, 1)[trained], kept[trained]), by_label)
        return loss.cross_entropy_sum(logits, wanted[:, positions], None if shifted is None else shifted[:, positions])

    def _inputs(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        if not (self.training and self._alpha):
            return {"input_ids": ids}
        embedded: Tensor = self.model.get_input_embeddings()(ids)
        made = noise(ids, positions, mask, width=embedded.shape[-1], alpha=self._alpha, seed=self.noise_seed)
        return {"inputs_embeds": embedded + made.to(embedded.dtype)}

    def _precision(self, device: str) -> AbstractContextManager[Any]:
        # Without its cache, for that would keep a second copy of every weight, ZeRO-3's gathered ones too.
        return torch.autocast(device, self._autocast, cache_enabled=False) if self._autocast else nullcontext()


def build_model(
    plan: ModelPlan,
    *,
    device: torch.device | str = "cpu",
    base: Any = None,
    start: Mapping[str, Tensor] | None = None,
) -> LossModel:
    """Loads the base, and makes all its weights trainable or freezes it and adds an adapter.

    A fresh adapter starts as `LoraPlan.init` says: A random by torch's current seed and B zero, or PiSSA's.

    Args:
        plan: what to build.
        device: where it will run.
        base: the base model, where it is not to be loaded from the plan's folder.
        start: weights that the adapter starts from, by their names in files; None for a fresh one.

    Raises:
        ModelError: the base cannot be loaded, or `lora` does not fit it.
    """
    dtype = resolve_dtype(plan.dtype, torch.device(device))
    base = _load(plan, dtype, device) if base is None else base
    model = base if plan.method == "full" else _adapted(base, plan, device, start)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    fit_head(base)
    lowered = dtype if plan.method == "full" and dtype != torch.float32 else None
    return LossModel(model, lowered, plan.neftune_alpha)


def _load(plan: ModelPlan, dtype: torch.dtype, device: torch.device | str) -> Any:
    extra: dict[str, Any] = {}
    if plan.quantization == "nf4":
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        extra["device_map"] = {"": device}
    kept = torch.float32 if plan.method == "full" else dtype
    try:
        base: Any = AutoModelForCausalLM.from_pretrained(
            plan.base, dtype=kept, attn_implementation=plan.attention, **extra
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"{plan.base}: the base model cannot be loaded ({error})") from error
    if plan.quantization != "none":
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    return base


def _adapted(base: Any, plan: ModelPlan, device: torch.device | str, start: Mapping[str, Tensor] | None) -> PeftModel:
    lora = plan.lora
    targets = lora.target_modules
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise ModelError(f"lora.target_modules {targets}: {error}") from error
    # PEFT writes the folder of this machine there, which says nothing to whoever loads the adapter.
    model.peft_config["default"].base_model_name_or_path = plan.base_id
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not _TRAINED.fullmatch(name):
            raise ModelError(f"lora.target_modules {targets}: {name} is no linear module's; name linear modules alone")
    if lora.init.startswith("pissa"):
        pissa.start(model, lora.init, device)
    if start is not None:
        _fill(model, start)
        if plan.reference:
            keep_start(model)
    fuse_lora(model)
    return model


def _fill(model: PeftModel, weights: Mapping[str, Tensor]) -> None:
    """Gives an adapter these weights."""
    own = {_file_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if {name: parameter.shape for name, parameter in own.items()} != {
        name: weight.shape for name, weight in weights.items()
    }:
        raise ModelError("model.adapter has weights of other modules or shapes than its own adapter_config.json says")
    for name, parameter in own.items():
        parameter.data = weights[name].to(parameter.device, torch.float32, copy=True)


def _drops(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """The base's type on a device; auto avoids bfloat16 where it would be emulated, many times slower."""
    if dtype != "auto":
        return torch.bfloat16 if dtype == "bfloat16" else torch.float32
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters in the model's order, under the names that files give them: PEFT's in an adapter, the
    base's own in full tuning.
    """
    return {_file_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _file_name(name: str) -> str:
    bare = name.removeprefix("model.").replace(".default.", ".")
    return bare.removesuffix(".weight") if bare.endswith(".lora_magnitude_vector.weight") else bare


def peft_config(model: LossModel) -> dict[str, Any] | None:
    """The adapter's PEFT configuration as plain JSON values, ready for adapter_config.json; None in full tuning.

    With PiSSA it is that of both its adapters as one, a plain LoRA of twice the rank.
    """
    if not isinstance(model.model, PeftModel):
        return None
    config: dict[str, Any] = model.model.peft_config["default"].to_dict()
    config["inference_mode"] = True
    if pissa.START in model.model.peft_config:
        rank, alpha = config["r"], config["lora_alpha"]
        scale = alpha / rank**0.5 if config["use_rslora"] else alpha / rank
        config |= {"r": 2 * rank, "lora_alpha": 2 * rank * scale, "use_rslora": False}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
