"""DeepSpeed: its config, its engine, and the trained weights' state read out whole and put back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft import pissa
from sft.errors import CheckpointError, TrainingError
from sft.mask import UNTRAINED
from sft.model import LossModel, trained_parameters
from sft.reference import as_reference

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by the names that torch gives them."""

BUCKET = 50_000_000
"""Numbers in the buffer through which ZeRO reduces gradients. DeepSpeed's default of 5e8 takes 2 GB, twice over on a
GPU, to reduce the gradients of an adapter that holds a tenth of that."""


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """How DeepSpeed runs; small, picklable, and the same on every worker."""

    zero_stage: Literal[0, 1, 2, 3]
    offload_optimizer: bool
    offload_parameters: bool
    micro_batch_size: int
    accumulation: int
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    max_grad_norm: float
    plus_ratio: float = 1.0
    """Learning rate of LoRA's B over that of everything else (LoRA+)."""


@dataclass(frozen=True, slots=True)
class ParameterState:
    """One trained parameter, whole: value and moments are float32 on the CPU, of the parameter's full shape.

    Rule: with PiSSA a value is joined with its frozen start (see `sft.pissa.joined`); the moments are not.
    """

    value: Tensor
    moments: Mapping[str, Tensor]


def deepspeed_config(plan: EnginePlan, workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Every value that has a surprising default is named."""
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage:
        zero["reduce_bucket_size"] = BUCKET
        zero |= {"overlap_comm": torch.cuda.is_available(), "contiguous_gradients": True}
    if plan.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if plan.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": plan.micro_batch_size * plan.accumulation * workers,
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": plan.max_grad_norm if plan.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 60,
        "wall_clock_breakdown": False,
    }


class Engine:
    """A DeepSpeed engine around a `LossModel`, as far as a training loop needs one.

    Args:
        model: the model, on the CPU or on this worker's device.
        plan: how to run it.
        workers: number of workers in the process group, which must be initialised.
        device: this worker's device.
    """

    def __init__(self, model: nn.Module, plan: EnginePlan, *, workers: int, device: torch.device) -> None:
        import deepspeed

        self.device = device
        self.workers = workers
        self.plan = plan
        groups = _groups(model, plan)
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas, weight_decay=plan.weight_decay)
        self._ratios = [plan.plus_ratio if group["is_b"] else 1.0 for group in groups]
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(plan, workers),
            dist_init_required=False,
        )
        self._engine.train()
        self._norm = 0.0
        if plan.zero_stage == 0:
            # Without ZeRO DeepSpeed clips but tells no norm; here the gradients are reduced and not yet used.
            optimizer.register_step_pre_hook(lambda *_: self._clip(parameters))

    @property
    def module(self) -> LossModel:
        """The wrapped model."""
        module = self._engine.module
        assert isinstance(module, LossModel)
        return module

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next optimizer step; LoRA+'s ratio comes on top of it."""
        for group, ratio in zip(self._optimizer.param_groups, self._ratios, strict=True):
            group["lr"] = rate * ratio

    def seed_noise(self, seed: int) -> None:
        """Seeds NEFTune's noise for the next step, the same on every worker."""
        self.module.noise_seed = seed

    def forward(self, **inputs: Any) -> Tensor:
        """Runs the model; returns what `LossModel.forward` says."""
        output = self._engine(**inputs)
        assert isinstance(output, Tensor)
        return output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients; afterwards all is as it was, random state included."""
        devices = [self.device] if self.device.type == "cuda" else []
        training = self.module.training
        self._engine.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                yield
        finally:
            self._engine.train(training)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is what it was before the stage's first step, and evaluated."""
        with self.evaluating(), as_reference(self.module):
            yield

    def backward(self, scaled_loss: Tensor) -> None:
        """Accumulates gradients of a loss that is scaled already; DeepSpeed adds no scaling of its own."""
        self._engine.backward(scaled_loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Ends a micro-batch; at the end of the accumulation window the optimizer steps."""
        self._engine.step()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return self._norm if self.plan.zero_stage == 0 else float(self._engine.get_global_grad_norm())

    def state(self, *, keep: bool = True) -> dict[str, ParameterState]:
        """Reads the trained parameters and their moments, whole, by their names in files. All workers must call it.

        Args:
            keep: False on workers that need no copy, which in full tuning is three times the model; they get nothing.
        """
        self._tie_moments()
        frozen = pissa.frozen_start(self.module)
        states = {}
        for name, parameter in trained_parameters(self.module).items():
            value = self._value(parameter)
            if name in frozen:
                value = pissa.joined(name, value, self._frozen(frozen[name]))
            state = ParameterState(value, {key: self._moment(parameter, key) for key in MOMENTS})
            if keep:
                states[name] = state
        return states

    def load_state(self, state: Mapping[str, ParameterState], steps: int) -> None:
        """Puts back what `state` read, at any world size and ZeRO stage. All workers must call it.

        Args:
            state: parameters by their names in files.
            steps: optimizer steps taken so far, which AdamW's bias correction needs.

        Raises:
            CheckpointError: the state is of other parameters.
            TrainingError: the frozen weights are not finite.
        """
        own, frozen = trained_parameters(self.module), pissa.frozen_start(self.module)
        parts = {name: pissa.parted(name, state[name].value) for name in frozen if name in state}
        values = {name: parts[name][0] if name in parts else saved.value for name, saved in state.items()}
        if {name: tuple(_shape(parameter)) for name, parameter in own.items()} != {
            name: tuple(value.shape) for name, value in values.items()
        }:
            raise CheckpointError(
                "the checkpoint's weights have other modules or another rank than this run's lora section and base"
            )
        self._make_moments()
        self._tie_moments()
        for name, parameter in own.items():
            self._put(parameter, ParameterState(values[name], state[name].moments))
        for name, parameter in frozen.items():
            self._fill(parameter, parts[name][1])
        for slot in self._base_optimizer.state.values():
            slot["step"] = torch.full_like(slot["step"], float(steps))

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        """The torch optimizer inside DeepSpeed's wrapper; the same one under stage 0."""
        base = self._optimizer if self.plan.zero_stage == 0 else self._optimizer.optimizer
        assert isinstance(base, torch.optim.Optimizer)
        return base

    def _make_moments(self) -> None:
        """Takes one step of rate 0 with zero gradients, for AdamW makes its moments only then."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self.set_learning_rate(0.0)
        blank = torch.zeros((1, 2), dtype=torch.int64, device=self.device)
        for _ in range(self.plan.accumulation):
            untrained = self.forward(
                input_ids=blank, labels=blank + UNTRAINED, position_ids=torch.arange(2, device=self.device)[None]
            )
            self.backward(untrained)
            self.step()
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        if not self._base_optimizer.state:  # a gradient of zero that is not finite
            raise TrainingError("the model's weights are not finite: look at the base model's files")

    def _tie_moments(self) -> None:
        """Under ZeRO 1 and 2 ties every group's moments to its parameters. DeepSpeed does it once, after the first
        group's first step, when the other groups have none yet.
        """
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.plan.zero_stage in (1, 2):
            zero, state = self._optimizer, self._base_optimizer.state
            for members, partition in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
                if partition in state:
                    lazy_init_hp_params_optimizer_state(members, partition, state)

    def _put(self, parameter: nn.Parameter, saved: ParameterState) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        self._fill(parameter, saved.value)
        if self.plan.zero_stage == 3:
            # Not `safe_set_full_*`: they fail where the workers' number does not divide the parameter's size.
            safe_set_local_fp32_param(parameter, self._part(saved.value, parameter))
            for key, moment in saved.moments.items():
                safe_set_local_optimizer_state(parameter, self._part(moment, parameter), key)
            return
        if self.plan.zero_stage == 0:
            for key, moment in saved.moments.items():
                self._optimizer.state[parameter][key].copy_(moment)
            return
        # ZeRO keeps an fp32 copy beside the model's own weights; both must hold the value.
        safe_set_full_fp32_param(parameter, saved.value.to(self.device))
        for key, moment in saved.moments.items():
            safe_set_full_optimizer_state(parameter, moment.to(self.device), key)

    def _part(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """This worker's part of a parameter under ZeRO-3, which fills the last part up with zeros."""
        shard: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        size = shard.numel()
        flat = whole.flatten().to(self.device)
        padded = torch.nn.functional.pad(flat, (0, size * self.workers - len(flat)))
        return padded.narrow(0, size * torch.distributed.get_rank(), size)

    def _fill(self, parameter: nn.Parameter, value: Tensor) -> None:
        with self._gathered(parameter, modifier_rank=0):
            parameter.data.copy_(value)

    def _frozen(self, parameter: nn.Parameter) -> Tensor:
        with self._gathered(parameter):
            return parameter.detach().float().cpu().clone()

    def _gathered(self, parameter: nn.Parameter, **how: Any) -> AbstractContextManager[Any]:
        """The parameter whole inside the context, whatever the stage."""
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(
            [parameter], enabled=self.plan.zero_stage == 3, **how
        )
        return gathered

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        limit = self.plan.max_grad_norm or float("inf")
        self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(self._norm):
            # ZeRO leaves such a step out by itself; AdamW does where there is no gradient.
            for parameter in parameters:
                parameter.grad = None

    def _value(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = parameter if self.plan.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        return value.detach().float().cpu().clone()

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self._base_optimizer.state:  # no step was taken yet
            return torch.zeros(_shape(parameter))
        if self.plan.zero_stage == 0:
            moment = self._optimizer.state[parameter][key]
        else:
            moment = safe_get_full_optimizer_state(parameter, key)
        assert isinstance(moment, Tensor)
        return moment.detach().float().cpu().clone()


def _groups(model: nn.Module, plan: EnginePlan) -> list[dict[str, Any]]:
    """Parameters by what sets them apart: LoRA's B has a rate of its own, and norms and biases no weight decay."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(model).items():
        groups.setdefault((".lora_B." in name and plan.plus_ratio != 1, parameter.ndim < 2), []).append(parameter)
    return [
        {"params": members, "is_b": is_b, **({"weight_decay": 0.0} if is_flat else {})}
        for (is_b, is_flat), members in groups.items()
    ]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's full shape; ZeRO-3 keeps it apart from the shard."""
    full: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return full
