"""DeepSpeed: its config, its engine, and the adapter's training state read out whole and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sft.errors import CheckpointError
from sft.mask import UNTRAINED
from sft.model import adapter_parameters

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, by the names that torch gives them."""


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


@dataclass(frozen=True, slots=True)
class ParameterState:
    """One trained parameter, whole: value and moments are float32 on the CPU, of the parameter's full shape."""

    value: Tensor
    moments: Mapping[str, Tensor]


def deepspeed_config(plan: EnginePlan, workers: int) -> dict[str, Any]:
    """DeepSpeed's configuration. Every value that has a surprising default is named."""
    zero: dict[str, Any] = {"stage": plan.zero_stage}
    if plan.zero_stage:
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
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(
            parameters, lr=plan.learning_rate, betas=plan.betas, weight_decay=plan.weight_decay
        )
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
    def module(self) -> nn.Module:
        """The wrapped model."""
        module = self._engine.module
        assert isinstance(module, nn.Module)
        return module

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next optimizer step."""
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    def forward(self, **inputs: Any) -> Tensor:
        """Runs the model; returns its scalar, or its logits where it generates."""
        output = self._engine(**inputs)
        assert isinstance(output, Tensor)
        return output

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Dropout off and no gradients; afterwards all is as it was, random state included."""
        devices = [self.device] if self.device.type == "cuda" else []
        self._engine.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                yield
        finally:
            self._engine.train()

    def backward(self, scaled_loss: Tensor) -> None:
        """Accumulates gradients of a loss that is scaled already; DeepSpeed adds no scaling of its own."""
        self._engine.backward(scaled_loss, scale_wrt_gas=False)

    def step(self) -> None:
        """Ends a micro-batch; at the end of the accumulation window the optimizer steps."""
        self._engine.step()

    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return self._norm if self.plan.zero_stage == 0 else float(self._engine.get_global_grad_norm())

    def state(self) -> dict[str, ParameterState]:
        """Reads the trained parameters and their moments, whole, by PEFT name. All workers must call it."""
        return {
            name: ParameterState(self._value(parameter), {key: self._moment(parameter, key) for key in MOMENTS})
            for name, parameter in adapter_parameters(self.module).items()
        }

    def load_state(self, state: Mapping[str, ParameterState], steps: int) -> None:
        """Puts back what `state` read, at any world size and ZeRO stage. All workers must call it.

        Args:
            state: parameters by PEFT name.
            steps: optimizer steps taken so far, which AdamW's bias correction needs.

        Raises:
            CheckpointError: the state is of other parameters.
        """
        own = adapter_parameters(self.module)
        if {name: tuple(_shape(parameter)) for name, parameter in own.items()} != {
            name: tuple(saved.value.shape) for name, saved in state.items()
        }:
            raise CheckpointError(
                "the checkpoint's adapter has other modules or another rank than this run's lora section"
            )
        self._make_moments()
        for name, parameter in own.items():
            self._put(parameter, state[name])
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

    def _put(self, parameter: nn.Parameter, saved: ParameterState) -> None:
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if self.plan.zero_stage == 3:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(saved.value)
        else:
            parameter.data.copy_(saved.value)
        if self.plan.zero_stage == 0:
            for key, moment in saved.moments.items():
                self._optimizer.state[parameter][key].copy_(moment)
            return
        # ZeRO keeps an fp32 copy beside the model's own weights; both must hold the value.
        safe_set_full_fp32_param(parameter, saved.value.to(self.device))
        for key, moment in saved.moments.items():
            safe_set_full_optimizer_state(parameter, moment.to(self.device), key)

    def _clip(self, parameters: list[nn.Parameter]) -> None:
        limit = self.plan.max_grad_norm or float("inf")
        self._norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _value(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        value: Tensor = parameter if self.plan.zero_stage == 0 else safe_get_full_fp32_param(parameter)
        return value.detach().float().cpu().clone()

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        if self.plan.zero_stage == 0:
            moment = self._optimizer.state[parameter].get(key) if parameter in self._optimizer.state else None
        else:
            moment = safe_get_full_optimizer_state(parameter, key)
        if not isinstance(moment, Tensor):  # no step was taken yet
            return torch.zeros(_shape(parameter))
        return moment.detach().float().cpu().clone()


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's full shape; ZeRO-3 keeps it apart from the shard."""
    full: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return full
