"""One global batch, cut in many ways among 1, 2 and 3 workers; `tests.sft.groups` runs it.

Each cut's gradients are compared with those that one process without DeepSpeed finds on the whole batch. A group also
trains with bad steps in between, which must leave no trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sft import loss
from sft.batch import Layout, WorkerBatch, deal, worker_batch
from sft.engine import Engine, EnginePlan, ParameterState
from sft.loop import BadStep, LoopPlan, run_loop
from sft.mask import UNTRAINED, Example
from sft.model import LoraPlan, LossModel, ModelPlan, build_model, trained_parameters
from sft.objective import tensors
from sft.schedule import Cosine
from tests.sft.steps import examples

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
LAYOUTS: tuple[Layout, ...] = ("packed", "padded")
WORKERS = (1, 2, 3)
SIZES = (1, 2, 3, 4)


def cuts(choice: str, workers: int) -> Iterator[tuple[Stage, int, list[tuple[int, Layout]]]]:
    """What a group runs: a ZeRO stage, an accumulation, and micro-batch sizes and layouts for both.

    `all` is every combination. `some` has every pair of micro-batch size with each of the others, and over the three
    groups three of four accumulations for each stage.
    """
    for stage, accumulation in product(STAGES, SIZES):
        if choice == "all":
            yield stage, accumulation, list(product(SIZES, LAYOUTS))
        elif accumulation == (stage + workers) % len(SIZES) + 1:
            yield stage, accumulation, [(micro, LAYOUTS[(micro + stage + workers) % 2]) for micro in SIZES]


def global_batch(workers: int, micro: int, accumulation: int, layout: Layout) -> list[list[Example]]:
    """Rows with uneven numbers of trained tokens, one row short, and one micro-batch without a trained token."""
    count = workers * micro * accumulation
    made = examples(count, 2 * count)
    rows = [[made[2 * i], made[2 * i + 1]] if layout == "packed" else [made[i]] for i in range(max(count - 1, 1))]
    lengths = [sum(len(example.input_ids) for example in row) for row in rows]
    masked = deal(lengths, workers, micro, accumulation)[0][0]
    if len(masked) < len(rows):
        for index in masked:
            rows[index] = [replace(e, labels=np.full_like(e.labels, UNTRAINED)) for e in rows[index]]
    return rows


def share(
    rows: list[list[Example]], step: int, rank: int, workers: int, micro: int, accumulation: int, layout: Layout
) -> WorkerBatch:
    return worker_batch(
        rows,
        epoch=0,
        step=step,
        before=0.0,
        after=0.0,
        rank=rank,
        workers=workers,
        micro_batch_size=micro,
        accumulation=accumulation,
        layout=layout,
        pad_id=2,
    )


def tiny(base: Path) -> LossModel:
    """The same small model every time, with an adapter that does something."""
    torch.manual_seed(0)
    model = build_model(ModelPlan(base, "tiny", "float32", "none", "sdpa", False, LoraPlan(4, 8, 0.0, "all-linear")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def engine_of(base: Path, stage: Stage, workers: int, accumulation: int) -> Engine:
    plan = EnginePlan(
        zero_stage=stage,
        offload_optimizer=False,
        offload_parameters=False,
        micro_batch_size=1,
        accumulation=accumulation,
        learning_rate=1e-2,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        max_grad_norm=0.0,
    )
    return Engine(tiny(base), plan, workers=workers, device=torch.device("cpu"))


def whole_gradients(model: LossModel, rows: list[list[Example]]) -> dict[str, Tensor]:
    """One process, one padded forward pass, no DeepSpeed."""
    alone = [[example] for row in rows for example in row]
    batch = share(alone, 0, 0, 1, len(alone), 1, "padded")
    model.zero_grad()
    (model(**tensors(batch.micro_batches[0], torch.device("cpu"))) * loss.normaliser(batch.weight, 1)).backward()
    return _copied({name: parameter.grad for name, parameter in trained_parameters(model).items()})


def _copied(gradients: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return {name: gradient.clone() for name, gradient in gradients.items() if gradient is not None}


def cut_gradients(engine: Engine, batch: WorkerBatch) -> dict[str, Tensor]:
    """The engine's gradients at the end of the accumulation window, whole; the weights stay."""
    from deepspeed.utils import safe_get_full_grad

    engine.set_learning_rate(0.0)
    factor = loss.normaliser(batch.weight, engine.workers)
    for number, micro in enumerate(batch.micro_batches, start=1):
        engine.backward(engine.forward(**tensors(micro, engine.device)) * factor)
        if number < len(batch.micro_batches):
            engine.step()
    found = {
        name: parameter.grad if engine.plan.zero_stage == 0 else safe_get_full_grad(parameter)
        for name, parameter in trained_parameters(engine.module).items()
    }
    copied = _copied(found)
    engine.step()
    return copied


def error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference in any parameter's gradient, relative to that gradient's largest value."""
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


def train_with_bad_steps(engine: Engine, rank: int, bad: dict[int, str]) -> tuple[dict[str, ParameterState], list[Any]]:
    """Trains four batches, some of which get an infinite loss or a gradient that is no number."""
    workers, accumulation = engine.workers, engine.plan.accumulation
    told: list[Any] = []
    forward, now = engine.forward, [0]

    def spoilt(**inputs: Tensor | None) -> Tensor:
        summed = forward(**inputs)
        how = bad.get(now[0])
        if how == "gradient":
            summed.register_hook(lambda gradient: gradient * float("nan"))
        return summed * float("inf") if how == "loss" and rank == workers - 1 else summed

    engine.forward = spoilt  # type: ignore[method-assign]

    def batches() -> Iterator[WorkerBatch]:
        for step in range(4):
            now[0] = step
            if bad.get(step) != "absent":
                rows = [[row] for row in examples(20 + step, workers * 2 * accumulation)]
                yield share(rows, step, rank, workers, 2, accumulation, "packed")

    def keep(step: BadStep) -> str:
        told.append([step.step, len(step.rows), len(step.suspects), str(step.loss)])
        return ""

    steps = 4 - sum(how == "absent" for how in bad.values())
    plan = LoopPlan(None, steps, Cosine(1e-2, 1e-2, 0.0), 0, None, "skip")
    run_loop(engine, plan, batches(), rank=rank, start=0, report=_nothing, save=_nothing, bad=keep)
    return engine.state(), told


def _nothing(*_: Any) -> None:
    return None


def run(rank: int, workers: int, folder: Path, choice: str) -> None:
    """What one worker of a group does, whose process group is made."""
    base = folder / "base"
    whole = tiny(base)
    errors: dict[str, float] = {}
    for stage, accumulation, runs in cuts(choice, workers):
        engine = engine_of(base, stage, workers, accumulation)
        for micro, layout in runs:
            rows = global_batch(workers, micro, accumulation, layout)
            found = cut_gradients(engine, share(rows, 0, rank, workers, micro, accumulation, layout))
            name = f"{workers} workers, ZeRO {stage}, {accumulation} x {micro} {layout}"
            errors[name] = error(found, whole_gradients(whole, rows))
    told: dict[str, Any] = {"errors": errors, "bad": {}}
    for stage in STAGES if workers == 2 or choice == "all" else ():
        after, seen = train_with_bad_steps(engine_of(base, stage, workers, 2), rank, {1: "loss", 2: "gradient"})
        without, _ = train_with_bad_steps(engine_of(base, stage, workers, 2), rank, {1: "absent", 2: "absent"})
        same = all(
            torch.equal(after[name].value, without[name].value)
            and all(torch.equal(moment, without[name].moments[key]) for key, moment in after[name].moments.items())
            for name in without
        )
        told["bad"][stage] = {"same": same, "seen": seen}
    (folder / f"cuts-{workers}-{rank}.json").write_text(json.dumps(told))
