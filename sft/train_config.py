"""The parts of a run's config that say what is trained: the base, the adapter, the optimisation and its loss."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from sft.section import Section

ENGINE_MAX_RANK = 512
"""The highest rank of an adapter that vLLM can be set to serve."""


class ModelSection(Section):
    """The base model."""

    base: str = Field(description="Folder of a checkpoint, or a Hugging Face model id.")
    base_id: str | None = Field(
        None, description="The base model's id for users and bundles; by default the last part of `base`."
    )
    adapter: str | None = Field(
        None,
        description="The adapter to go on from, with its own rank and modules: the folder or address of a bundle, or a "
        "version in `registry` (NAME@vN). The result is again one adapter on the base.",
    )
    chat_template: str | None = Field(
        None, description="A file with the Jinja chat template to use in place of the tokenizer's own."
    )
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="Type of the frozen base; auto is bfloat16 where the hardware multiplies it, else float32."
    )
    quantization: Literal["none", "nf4"] = Field("none", description="nf4 loads the base in 4 bits (QLoRA).")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="Attention kernel.")
    gradient_checkpointing: bool = Field(False, description="Trade about a third of the speed for activation memory.")

    @property
    def id(self) -> str:
        """The base model's id."""
        return self.base_id or self.base.rstrip("/").rsplit("/", 1)[-1]

    @property
    def adapter_version(self) -> str | None:
        """The version of a registry that `adapter` names; None where it is a bundle, or none."""
        return self.adapter if self.adapter and re.fullmatch(r"[^/]+@v[1-9][0-9]*", self.adapter) else None


class LoraSection(Section):
    """The adapter."""

    rank: int = Field(16, gt=0, le=ENGINE_MAX_RANK, description="Rank of the update.")
    alpha: float = Field(32.0, gt=0, description="Scale; the update is multiplied by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: list[str] | Literal["all-linear"] = Field(
        "all-linear", description="Names of linear modules to adapt, or all-linear."
    )
    rslora: bool = Field(False, description="Scale by alpha / sqrt(rank), which keeps high ranks learning (rsLoRA).")
    dora: bool = Field(False, description="Train each weight row's length apart (DoRA); the result is a merged model.")
    init: str = Field(
        "default",
        pattern=r"^(default|gaussian|pissa|pissa_niter_[1-9][0-9]?)$",
        description="Start of A and B: default, gaussian, pissa (the base's largest singular directions; doubles the "
        "bundle's rank), or pissa_niter_N (the same, approximated in N rounds: much faster).",
    )
    plus_ratio: float = Field(1.0, gt=0, description="Learning rate of B over that of A (LoRA+); 16 is usual.")


class TrainSection(Section):
    """The optimisation."""

    stage: Literal["sft", "dpo"] = Field(
        "sft", description="sft trains on answers; dpo on pairs of a chosen and a rejected answer, by preference."
    )
    method: Literal["lora", "full"] = Field(
        "lora", description="lora trains an adapter on the frozen base; full trains every weight of the base."
    )
    epochs: int | None = Field(None, gt=0, description="Passes over the data; 1 where max_steps is not set either.")
    max_steps: int | None = Field(
        None,
        gt=0,
        description="Stop after so many optimizer steps. Without epochs, training starts before the data was counted.",
    )
    global_batch_size: int = Field(16, gt=0, description="Rows per optimizer step, over all workers.")
    micro_batch_size: int = Field(4, gt=0, description="Rows per forward pass of one worker.")
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="A row is a pack of examples of up to data.max_length tokens, or one example with padding.",
    )
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    min_learning_rate: float = Field(0.0, ge=0, description="Learning rate at the end of the cosine.")
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of the steps with a rising learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay.")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW betas.")
    max_grad_norm: float = Field(1.0, ge=0, description="Clip the gradient's norm; 0 switches clipping off.")
    neftune_alpha: float = Field(
        0.0, ge=0, description="Noise on the embeddings in training (NEFTune); 5 is usual, 0 switches it off."
    )
    seed: int = Field(0, ge=0, description="Seed of initialisation, dropout, noise and data order.")
    on_bad_loss: Literal["stop", "skip"] = Field(
        "stop", description="What a step without a finite loss and gradient does: stop the run, or be left out of it."
    )

    @property
    def whole_epochs(self) -> int | None:
        """Passes over the data; None where steps alone end the run."""
        return 1 if self.epochs is None and self.max_steps is None else self.epochs

    @model_validator(mode="after")
    def _floor_under_peak(self) -> Self:
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self


class PreferenceSection(Section):
    """The loss of stage dpo."""

    beta: float = Field(0.1, gt=0, description="How firmly the model is held to its start; lower lets it move further.")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="Share of pairs that are taken to be labelled the wrong way round."
    )
