"""The methods of tuning, each trained a few steps in plain processes; `tests.sft.steps` runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from sft.batch import accumulation_steps
from sft.engine import Engine, EnginePlan
from sft.loop import StepReport
from sft.model import LoraPlan, ModelPlan, build_model
from tests.sft.steps import GLOBAL_BATCH, train

Stage = Literal[0, 1, 2, 3]
Keep = Callable[[str, Engine, list[StepReport]], None]

_LORA = LoraPlan(4, 8, 0.0, "all-linear")


@dataclass(frozen=True)
class Method:
    """A method, and the stages of a run that stops half-way and goes on under another one."""

    model: dict[str, Any]
    halves: tuple[Stage, Stage]
    plus_ratio: float = 1.0


METHODS: dict[str, Method] = {
    "plus": Method(
        {"lora": replace(_LORA, rslora=True, init="gaussian"), "neftune_alpha": 5.0}, (2, 0), plus_ratio=8.0
    ),
    "pissa": Method({"lora": replace(_LORA, init="pissa")}, (2, 0)),
    "dora": Method({"lora": replace(_LORA, dora=True)}, (0, 2)),
    "full": Method({"method": "full", "gradient_checkpointing": True}, (3, 2)),
    "nf4": Method({"quantization": "nf4"}, (2, 0)),
}


def make_engine(base: Path, method: Method, stage: Stage, workers: int) -> Engine:
    """A tiny model in an engine, the same start every time."""
    torch.manual_seed(0)
    plan = ModelPlan(base, "tiny", "float32", "none", "sdpa", False, _LORA)
    engine = EnginePlan(
        zero_stage=stage,
        offload_optimizer=False,
        offload_parameters=False,
        micro_batch_size=2,
        accumulation=accumulation_steps(GLOBAL_BATCH, workers, 2),
        learning_rate=1e-2,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        max_grad_norm=0.5,
        plus_ratio=method.plus_ratio,
    )
    return Engine(build_model(replace(plan, **method.model)), engine, workers=workers, device=torch.device("cpu"))


def train_methods(base: Path, rank: int, workers: int, keep: Keep) -> None:
    """Trains every method: with one worker in one go without ZeRO, with more in two halves under two stages."""
    for name, method in METHODS.items():
        if workers == 1:
            engine = make_engine(base, method, 0, workers)
            keep(name, engine, train(engine, rank))
            continue
        before, after = method.halves
        first = make_engine(base, method, before, workers)
        reports = train(first, rank, stop=2)
        half = first.state()
        second = make_engine(base, method, after, workers)
        second.load_state(half, 2)
        keep(name, second, [*reports, *train(second, rank, start=2)])
