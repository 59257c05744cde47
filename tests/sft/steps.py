"""Runs training steps in plain processes, as `torchrun` would; `tests.sft.groups` starts them.

For every ZeRO stage it trains a few steps from the same start and writes losses, gradient norms and the adapter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file

from sft.batch import Layout, WorkerBatch, accumulation_steps, worker_batch
from sft.engine import Engine, EnginePlan
from sft.errors import TrainingError
from sft.evaluation import Evaluation, EvaluationPlan, Evaluator
from sft.loop import LoopPlan, StepReport, run_loop
from sft.mask import UNTRAINED, Example
from sft.model import LoraPlan, LossModel, ModelPlan, build_model
from sft.schedule import Cosine
from sft.watch import Watch, WatchPlan

STEPS = 4
GLOBAL_BATCH = 6
VOCABULARY = 200


def examples(seed: int, count: int) -> list[Example]:
    """Random examples of uneven length and uneven numbers of trained tokens."""
    draw = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(draw.integers(4, 20))
        ids = draw.integers(3, VOCABULARY, length).astype(np.int32)
        labels = ids.copy()
        labels[: int(draw.integers(1, length))] = UNTRAINED
        made.append(Example(str(number), ids, labels))
    return made


def make_model(base: Path, dtype: Literal["float32", "bfloat16"]) -> LossModel:
    """A tiny model, the same start every time."""
    torch.manual_seed(0)
    model = build_model(ModelPlan(base, "tiny", dtype, "none", "sdpa", False, LoraPlan(4, 8, 0.0, "all-linear")))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def make_engine(
    base: Path, stage: Literal[0, 1, 2, 3], workers: int, micro: int, dtype: Literal["float32", "bfloat16"]
) -> Engine:
    """That model in an engine."""
    model = make_model(base, dtype)
    plan = EnginePlan(
        zero_stage=stage,
        offload_optimizer=False,
        offload_parameters=False,
        micro_batch_size=micro,
        accumulation=accumulation_steps(GLOBAL_BATCH, workers, micro),
        learning_rate=1e-2,
        betas=(0.9, 0.999),
        weight_decay=0.01,
        max_grad_norm=0.5,
    )
    return Engine(model, plan, workers=workers, device=torch.device("cpu"))


def train(
    engine: Engine,
    rank: int,
    start: int = 0,
    stop: int = STEPS,
    layout: Layout = "packed",
    watch: Callable[[WorkerBatch, StepReport, bool], bool] = lambda *_: False,
) -> list[StepReport]:
    """Trains steps `start` to `stop` of one epoch whose last batch is short."""
    rows = examples(7, GLOBAL_BATCH * STEPS - 5)

    def batches() -> Iterator[WorkerBatch]:
        for step in range(start, stop):
            yield worker_batch(
                [[row] for row in rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]],
                epoch=0,
                step=step,
                before=step / STEPS,
                after=(step + 1) / STEPS,
                rank=rank,
                workers=engine.workers,
                micro_batch_size=engine.plan.micro_batch_size,
                accumulation=engine.plan.accumulation,
                layout=layout,
                pad_id=2,
            )

    reports: list[StepReport] = []
    plan = LoopPlan(None, STEPS, Cosine(1e-2, 0.0, 1 / STEPS), seed=0, save_every=None)
    with suppress(StopIteration):  # the first half of a run ends before the run does
        run_loop(
            engine,
            plan,
            batches(),
            rank=rank,
            start=start,
            report=reports.append,
            save=lambda *_: None,
            bad=lambda _: "F",
            watch=watch,
        )
    return reports


def evaluation_plan(layout: Layout = "packed") -> EvaluationPlan:
    """Two sources of five and three examples, and two prompts; nothing ends an answer."""
    rows = examples(11, 8)
    sources = {"one": rows[:5], "two": rows[5:]}
    return EvaluationPlan(sources, {"a": [5, 6, 7], "b": [9, 30, 31, 40]}, 3, frozenset({1}), layout, 24, 2)


def evaluate(engine: Engine, rank: int, folder: Path) -> dict[str, Any]:
    """Trains with a look before, after two steps and at the end; tells what was seen, and what it has disturbed."""
    seen: list[Evaluation] = []
    kept: list[int] = []
    evaluator = Evaluator(engine, evaluation_plan(), rank)
    watch = Watch(
        WatchPlan(every_steps=2, patience=None, min_delta=0.0, keep_best=True),
        evaluator,
        tell=seen.append,
        keep=lambda _, report, __: kept.append(report.step),
    )
    before = torch.get_rng_state()
    watch.before()
    undisturbed = torch.equal(before, torch.get_rng_state())
    reports = train(engine, rank, watch=watch.after)
    if rank == 0:
        values = {key: value.value for key, value in engine.state().items()}
        save_file(values, folder / f"{engine.workers}-evaluated{engine.plan.zero_stage}.safetensors")
    else:
        engine.state()
    return {
        "loss": [report.loss for report in reports],
        "grad_norm": [report.grad_norm for report in reports],
        "history": watch.history,
        "kept": kept,
        "undisturbed": undisturbed and engine.module.training,
        "sources": {name: asdict(score) for name, score in seen[0].sources.items()},
        "samples": [sample.ids for sample in seen[0].samples],
    }


def main(rank: int, workers: int, folder: Path) -> None:
    """Trains under every stage, and hands the state of stage 0 half-way to every other one."""
    base = folder / "base"
    told: dict[str, Any] = {}

    def keep(name: str, engine: Engine, reports: list[StepReport]) -> None:
        state = engine.state()
        told[name] = {"loss": [r.loss for r in reports], "grad_norm": [r.grad_norm for r in reports]}
        if rank == 0:
            save_file({key: value.value for key, value in state.items()}, folder / f"{workers}-{name}.safetensors")

    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    for stage in stages:
        for layout in ("packed", "padded") if stage == 0 else ("packed",):
            engine = make_engine(base, stage, workers, 2, "float32")
            keep(f"stage{stage}-{layout}", engine, train(engine, rank, layout=layout))
    for before, after in ((0, 2), (2, 3), (3, 0), (1, 1)):
        first = make_engine(base, stages[before], workers, 2, "float32")
        train(first, rank, stop=2)
        half = first.state()
        second = make_engine(base, stages[after], workers, 2, "float32")
        second.load_state(half, 2)
        keep(f"resumed{before}to{after}", second, train(second, rank, start=2))
    for stage in stages if workers > 1 else stages[:1]:
        engine = make_engine(base, stage, workers, 2, "float32")
        told[f"evaluated{stage}"] = evaluate(engine, rank, folder)
    engine = make_engine(base, 0, workers, 2, "float32")
    padded = Evaluator(engine, evaluation_plan("padded"), rank)(0, 0.0)
    told["evaluated-padded"] = {name: asdict(score) for name, score in padded.sources.items()}
    engine = make_engine(base, 3, workers, 2, "bfloat16")
    keep("stage3-bfloat16", engine, train(engine, rank))
    engine = make_engine(base, 0, workers, 2, "bfloat16")
    keep("stage0-bfloat16", engine, train(engine, rank))
    engine = make_engine(base, 1, workers, 2, "float32")
    with torch.no_grad():
        next(p for name, p in engine.module.named_parameters() if "lora_B" in name).fill_(float("nan"))
    try:
        train(engine, rank)
    except TrainingError as error:
        told["error"] = str(error)
    from tests.sft.method_steps import train_methods

    train_methods(base, rank, workers, keep)
    if rank == 0:
        (folder / f"{workers}.json").write_text(json.dumps(told))
