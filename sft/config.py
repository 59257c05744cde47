"""The configuration of a training run: one YAML file plus dotted overrides, all faults reported at once.

This is the only reader of config files; serving reads its own model through `read_config`, too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Discriminator, Field, PositiveInt, Tag, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sft.adapter import NAME_PATTERN
from sft.data_config import DataSection
from sft.errors import ConfigError
from sft.evaluate_config import EvaluateSection
from sft.section import Section
from sft.tracking_config import TrackingSection
from sft.train_config import ENGINE_MAX_RANK, LoraSection, ModelSection, PreferenceSection, TrainSection


class DeepSpeedSection(Section):
    """How DeepSpeed shards the training state."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="0 shards nothing, 1 optimizer state, 2 gradients too, 3 weights too."
    )
    offload_optimizer: bool = Field(False, description="Keep optimizer state in host memory.")
    offload_parameters: bool = Field(False, description="Keep sharded weights in host memory (stage 3).")


class WorkerRange(Section):
    """A number of workers that follows the cluster."""

    min: int = Field(gt=0, description="Fewest workers to train with; below, the run waits.")
    max: int = Field(gt=0, description="Most workers to train with.")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    @property
    def elastic(self) -> bool:
        """Whether it can change while a run goes on."""
        return self.min < self.max


NumWorkers = Annotated[
    Annotated[PositiveInt, Tag("|number")] | Annotated[WorkerRange, Tag("|range")],
    Discriminator(lambda value: "|range" if isinstance(value, WorkerRange | Mapping) else "|number"),
]
"""A fixed number of workers or a range; the tags are left out of messages."""


class ScalingSection(Section):
    """Ray Train's ScalingConfig."""

    num_workers: NumWorkers = Field(
        1,
        description="Training workers, one GPU each when use_gpu is set; min and max: as many as there is room for.",
    )
    resize_interval_s: float = Field(
        60.0, gt=0, description="With min and max: how often to look for room, as a resize repeats steps."
    )
    use_gpu: bool = Field(False, description="Train on GPUs (nccl) rather than CPUs (gloo).")
    cpus_per_worker: float = Field(1.0, gt=0, description="Logical CPUs that each worker reserves.")
    placement_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = Field(
        "PACK", description="How Ray places workers on nodes."
    )
    resource_timeout_s: float = Field(600.0, gt=0, description="How long to wait for the workers' resources.")

    @property
    def workers(self) -> WorkerRange:
        """Fewest and most workers."""
        number = self.num_workers
        return number if isinstance(number, WorkerRange) else WorkerRange(min=number, max=number)


class FailureSection(Section):
    """Ray Train's FailureConfig."""

    max_failures: int = Field(0, ge=-1, description="Restarts of the worker group before the run fails; -1: no limit.")


class CheckpointSection(Section):
    """Ray Train's CheckpointConfig."""

    every_steps: int | None = Field(None, gt=0, description="Also save every so many steps, not only at the end.")
    num_to_keep: int | None = Field(2, gt=0, description="Newest checkpoints to keep; null keeps all.")


class RaySection(Section):
    """Which Ray cluster to use."""

    address: str | None = Field(
        None,
        description="auto or an address joins a running cluster, local starts one; null joins where a job set it, else "
        "starts one.",
    )
    num_cpus: int | None = Field(None, gt=0, description="Logical CPUs of a Ray that is started here.")


class TrainConfig(Section):
    """A training run, whole."""

    name: str = Field(pattern=NAME_PATTERN, description="Name of the run and of the adapter that it publishes.")
    storage: str = Field(description="Where runs are kept: a folder or an address (s3://, gs://).")
    registry: str | None = Field(None, description="Registry to publish to; null writes the bundle only.")
    alias: str | None = Field(None, pattern=NAME_PATTERN, description="Alias that the new version takes at once.")
    model: ModelSection
    lora: LoraSection = LoraSection()
    data: DataSection
    train: TrainSection = TrainSection()
    preference: PreferenceSection = PreferenceSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    scaling: ScalingSection = ScalingSection()
    failure: FailureSection = FailureSection()
    checkpoint: CheckpointSection = CheckpointSection()
    ray: RaySection = RaySection()

    @property
    def makes_model(self) -> bool:
        """Whether the run's result is a model folder, because no adapter bundle can hold it."""
        return self.train.method == "full" or self.lora.dora

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        faults = [*self._method_faults(), *self._stage_faults(), *self._start_faults()]
        if self.deepspeed.zero_stage == 3 and self.model.quantization != "none":
            faults.append(
                "deepspeed.zero_stage 3 cannot shard a 4-bit base: use stage 0, 1 or 2, or model.quantization none"
            )
        if self.deepspeed.offload_parameters and self.deepspeed.zero_stage != 3:
            faults.append("deepspeed.offload_parameters needs zero_stage 3")
        if self.deepspeed.offload_optimizer and self.deepspeed.zero_stage == 0:
            faults.append("deepspeed.offload_optimizer needs zero_stage 1, 2 or 3")
        if self.model.attention == "flash_attention_2" and not self.scaling.use_gpu:
            faults.append("model.attention flash_attention_2 needs scaling.use_gpu: use sdpa on CPU")
        if self.alias is not None and self.registry is None:
            faults.append("alias needs a registry: set registry, or leave alias out")
        both = sorted({s.label for s in self.data.sources} & {s.label for s in self.evaluate.sources})
        if both:
            faults.append(f"{', '.join(both)} is a source of data and of evaluate: give one of them another `name`")
        if self.tracking.tensorboard and "://" in self.storage:
            faults.append(
                "tracking.tensorboard needs a local storage, for its files grow and objects cannot: use "
                "tracking.mlflow or tracking.wandb"
            )
        most = self.scaling.workers.max
        if self.train.global_batch_size < most:
            faults.append(
                f"train.global_batch_size {self.train.global_batch_size} is smaller than scaling.num_workers {most}: "
                "every worker needs a row"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def on_pairs(self) -> bool:
        """Whether the run trains on pairs of answers."""
        return self.train.stage == "dpo"

    def _stage_faults(self) -> list[str]:
        """What the chosen stage cannot go with."""
        sources = [*self.data.sources, *self.evaluate.sources]
        if not self.on_pairs:
            of_pairs = [source.label for source in sources if source.format == "preference"]
            faults = []
            if of_pairs:
                faults.append(f"{', '.join(of_pairs)}: format preference is read by train.stage dpo: set it")
            if self.preference != PreferenceSection():
                faults.append("preference is read by train.stage dpo: set it, or leave preference out")
            return faults
        single = [source.label for source in sources if source.format not in ("auto", "preference")]
        checked = [
            (bool(single), f"reads pairs, and {', '.join(single)} is of another format: use format preference or auto"),
            (self.train.layout == "packed", "has no train.layout packed, for a pair is a row of its own: use padded"),
            (self.train.method == "full", "compares an adapter with its start: use train.method lora"),
            (self.train.neftune_alpha > 0, "measures against the base without noise: use train.neftune_alpha 0"),
            (self.data.mask.prompt_weight > 0, "compares answers to one prompt: use data.mask.prompt_weight 0"),
        ]
        return [f"train.stage dpo {fault}" for is_so, fault in checked if is_so]

    def _start_faults(self) -> list[str]:
        """What an adapter to go on from cannot go with."""
        if self.model.adapter is None:
            return []
        own = {name: value for name, value in self.lora if name not in ("dropout", "plus_ratio")}
        given = [f"lora.{name}" for name, value in own.items() if value != LoraSection.model_fields[name].default]
        faults = []
        if given:
            faults.append(f"model.adapter brings its own shape and reads no {', '.join(given)}: leave it out")
        if self.train.method == "full":
            faults.append("model.adapter cannot start train.method full: merge it into the base, or use method lora")
        if self.model.adapter_version and self.registry is None:
            faults.append(f"model.adapter {self.model.adapter} is a version: set the registry that it is in")
        return faults

    def _method_faults(self) -> list[str]:
        """What the chosen method of tuning cannot go with."""
        faults = []
        lora, pissa = self.lora, self.lora.init.startswith("pissa")
        if self.train.method == "full":
            given = [f"lora.{name}" for name, value in lora if value != type(lora).model_fields[name].default]
            if given:
                faults.append(f"train.method full trains no adapter and reads no {', '.join(given)}: leave it out")
            if self.model.quantization != "none":
                faults.append(
                    "train.method full cannot train a 4-bit base: use model.quantization none, or train.method lora"
                )
        if self.makes_model and (self.registry is not None or self.alias is not None):
            what, instead = (
                ("train.method full", "train.method lora")
                if self.train.method == "full"
                else ("lora.dora", "lora.dora false")
            )
            faults.append(
                f"{what} makes no adapter that the engine can serve, so nothing can be published: leave registry and "
                f"alias out and serve the run's model folder as `base`, or use {instead}"
            )
        if lora.dora and self.model.quantization != "none":
            faults.append(
                "lora.dora with a 4-bit base would be merged into other weights than it was trained on: use "
                "model.quantization none, or lora.dora false"
            )
        if lora.dora and self.deepspeed.zero_stage == 3:
            faults.append(
                "lora.dora needs whole base weights, which deepspeed.zero_stage 3 shards: use stage 0, 1 or 2"
            )
        if pissa and lora.dora:
            faults.append("lora.init pissa does not go with lora.dora: use lora.init default, or lora.dora false")
        if pissa and self.model.quantization != "none":
            faults.append(
                f"lora.init {lora.init} starts from the base's own weights, which a 4-bit base has lost: use "
                "model.quantization none, or lora.init default"
            )
        if pissa and 2 * lora.rank > ENGINE_MAX_RANK:
            faults.append(
                f"lora.init {lora.init} doubles the bundle's rank to {2 * lora.rank}, and the engine serves at most "
                f"{ENGINE_MAX_RANK}: use lora.rank {ENGINE_MAX_RANK // 2} or less"
            )
        if self.model.attention == "flash_attention_2" and self.model.dtype == "float32":
            faults.append("model.attention flash_attention_2 does not compute in float32: use dtype bfloat16, or sdpa")
        return faults


Config = TypeVar("Config", bound=BaseModel)


def read_config(
    model: type[Config], path: Path | None, overrides: Mapping[str, Any] | None = None, unknown: tuple[str, ...] = ()
) -> Config:
    """Reads and validates a config.

    Args:
        model: what the file must hold.
        path: a YAML file, or None where overrides say it all.
        overrides: nested values that win over the file.
        unknown: command-line options that no field knows; reported with the other faults.

    Raises:
        ConfigError: with every fault: what was got, what is allowed, and the nearest known key for an unknown one.
    """
    origin = str(path) if path else "command line"
    values = _merge(_read_yaml(path) if path else {}, overrides or {})
    faults = [f"{option}: no such option{_nearest(option.lstrip('-'), _keys(model))}" for option in unknown]
    try:
        config = model.model_validate(values)
    except ValidationError as error:
        raise ConfigError(origin, [*(_fault(detail, model) for detail in error.errors()), *faults]) from None
    if faults:
        raise ConfigError(origin, faults)
    return config


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(str(path), ["there is no such file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), [f"the file cannot be read: {error}"]) from None
    except yaml.YAMLError as error:
        raise ConfigError(str(path), [f"not valid YAML: {' '.join(str(error).split())}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(str(path), [f"expected `key: value` lines at the top, got {type(values).__name__}"])
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = merged.get(key)
        merged[key] = _merge(nested, value) if isinstance(nested, dict) and isinstance(value, Mapping) else value
    return merged


def _fault(detail: ErrorDetails, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in detail["loc"] if not str(part).startswith("|"))
    if detail["type"] == "extra_forbidden":
        return f"{key}: no such key{_nearest(key, _keys(model))}"
    if detail["type"] == "missing":
        return f"{key}: is missing and has no default"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{key}: {message}" if key else message
    got = detail["input"]
    return f"{key}: {message}, got {got!r}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """All dotted keys of a config model."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def _nearest(key: str, known: list[str]) -> str:
    bare = re.sub(r"\.\d+", "", key)
    near = difflib.get_close_matches(bare, known, n=1, cutoff=0.6)
    if not near:
        last = bare.rsplit(".", 1)[-1]
        near = [other for other in known if other.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {near[0]}?" if near else ""
