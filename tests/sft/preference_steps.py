"""DPO in plain processes, on pairs and a start that TRL was given as well; `tests.sft.groups` runs it.

All weights are drawn by numpy, whose streams do not change with its versions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sft.batch import WorkerBatch, worker_batch
from sft.engine import Engine, EnginePlan
from sft.evaluation import EvaluationPlan, Evaluator
from sft.files import list_files, read
from sft.formats import RowSpec
from sft.loop import LoopPlan, StepReport, run_loop
from sft.mask import Example
from sft.model import LoraPlan, LossModel, ModelPlan, build_model, peft_config, trained_parameters
from sft.objective import Preference
from sft.rows import Rules, SourcePlan, examples, prepare
from sft.schedule import Cosine
from tests.tiny import small_base

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Without a line break after the stop token: TRL would train it, and raysft does not."""
PAIRS = (
    ("My parcel is late.", '{"procedure": "SHP-02"}', "Sorry to hear that!"),
    ("I forgot my password.", '{"procedure": "ACC-01"}', "Have you tried to remember it?"),
    ("The box was empty.", '{"procedure": "SHP-05"}', "That is odd."),
    ("Where is my refund?", '{"procedure": "RET-03"}', "It will come in a few days, I am sure of it."),
)
BETA, RATE, STEPS = 0.2, 2e-3, 3
OBJECTIVE = Preference(BETA)
PLAN = ModelPlan(Path(), "tiny", "float32", "none", "sdpa", False, LoraPlan(4, 8, 0.0, "all-linear"), reference=True)


def rows() -> list[dict[str, Any]]:
    """The pairs as TRL reads them, and as raysft does."""
    return [
        {
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for prompt, chosen, rejected in PAIRS
    ]


def pairs(folder: Path) -> list[Example]:
    """The pairs, masked; the folder is no other process's."""
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    (table,) = read(list_files(str(path), "s")[0])
    sources = {"s": SourcePlan(RowSpec("preference"), "", "")}
    return examples(prepare(table, small_base(TEMPLATE), sources, Rules(500, truncate=False, pairs=True)))


def draw(parameters: dict[str, Tensor], seed: int, spread: float) -> None:
    """Fills weights, in the order of their names; norms stay as they are."""
    stream = np.random.default_rng(seed)
    with torch.no_grad():
        for name in sorted(parameters):
            if "norm" not in name:
                parameters[name].copy_(torch.from_numpy(stream.normal(0, spread, tuple(parameters[name].shape))))


def write_base(tiny: Path, folder: Path) -> Path:
    """The tiny model with other weights."""
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    draw(weights, 0, 0.1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def start_weights(base: Path, *, fresh: bool) -> dict[str, Tensor]:
    """An adapter to start from; a fresh one changes nothing yet."""
    weights = {name: value.detach() for name, value in trained_parameters(make_model(base, None)).items()}
    draw(weights, 1, 0.05)
    return {name: weight * 0 if fresh and "lora_B" in name else weight for name, weight in weights.items()}


def write_start(base: Path, folder: Path, *, fresh: bool) -> Path:
    """That adapter as PEFT's two files."""
    folder.mkdir(parents=True)
    save_file(start_weights(base, fresh=fresh), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(peft_config(make_model(base, None))))
    return folder


def make_model(base: Path, start: dict[str, Tensor] | None) -> LossModel:
    return build_model(replace(PLAN, base=base), start=start)


def make_engine(base: Path, stage: Literal[0, 1, 2, 3], workers: int, accumulation: int, *, fresh: bool) -> Engine:
    """That start in an engine. A fresh adapter is filled after it was made, so that its reference is the base."""
    weights = start_weights(base, fresh=fresh)
    model = make_model(base, None if fresh else weights)
    if fresh:
        with torch.no_grad():
            for name, parameter in trained_parameters(model).items():
                parameter.copy_(weights[name])
    plan = EnginePlan(
        zero_stage=stage,
        offload_optimizer=False,
        offload_parameters=False,
        micro_batch_size=4 // (workers * min(accumulation, 2)),
        accumulation=accumulation,
        learning_rate=RATE,
        betas=(0.9, 0.999),
        weight_decay=0.0,
        max_grad_norm=0.0,
    )
    return Engine(model, plan, workers=workers, device=torch.device("cpu"))


def train(engine: Engine, rank: int, examples: list[Example], start: int = 0, stop: int = STEPS) -> list[StepReport]:
    """Trains steps of all four pairs each. With an accumulation of 3 each worker's last micro-batch is empty."""

    def batches() -> Iterator[WorkerBatch]:
        for step in range(start, stop):
            yield worker_batch(
                [[example] for example in examples],
                epoch=step,
                step=0,
                before=step,
                after=step + 1,
                rank=rank,
                workers=engine.workers,
                micro_batch_size=engine.plan.micro_batch_size,
                accumulation=engine.plan.accumulation,
                layout="padded",
                pad_id=2,
            )

    reports: list[StepReport] = []
    with suppress(StopIteration):  # half a run
        run_loop(
            engine,
            LoopPlan(None, STEPS, Cosine(RATE, RATE, 0.0), seed=0, save_every=None),
            batches(),
            rank=rank,
            start=start,
            report=reports.append,
            save=lambda *_: None,
            bad=lambda _: "F",
            objective=OBJECTIVE,
        )
    return reports


def evaluate(engine: Engine, rank: int, examples: list[Example]) -> dict[str, Any]:
    """Two sources of three pairs and one, two forward passes at most."""
    plan = EvaluationPlan({"one": examples[:3], "two": examples[3:]}, {}, 1, frozenset(), "padded", 200, 2)
    found = Evaluator(engine, plan, rank, OBJECTIVE)(0, 0.0)
    return {name: asdict(score) for name, score in found.sources.items()}


def main(rank: int, workers: int, folder: Path) -> None:
    """Trains from a start and afresh under every stage, whole and in halves, and tells of every step."""
    base = folder / "preference-base"
    if workers == 1:
        write_base(folder / "base", base)
    with tempfile.TemporaryDirectory() as mine:
        of = pairs(Path(mine))
    told: dict[str, Any] = {}

    def keep(name: str, engine: Engine, reports: list[StepReport]) -> None:
        state = engine.state()
        told[name] = [{"loss": report.loss, "norm": report.grad_norm, **report.figures} for report in reports]
        if rank == 0:
            values = {key: value.value for key, value in state.items()}
            save_file(values, folder / f"preference-{workers}-{name}.safetensors")

    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3) if workers == 2 else (0,)
    for stage in stages:
        engine = make_engine(base, stage, workers, 3 if stage % 2 else 1, fresh=False)
        told[f"before-{stage}"] = evaluate(engine, rank, of)
        keep(f"started-{stage}", engine, train(engine, rank, of))
        told[f"after-{stage}"] = evaluate(engine, rank, of)
    engine = make_engine(base, stages[-1], workers, 2, fresh=True)
    keep(f"fresh-{stages[-1]}", engine, train(engine, rank, of))
    for before, after in [(0, 0)] if workers == 1 else [(2, 3)]:
        first = make_engine(base, before, workers, 1, fresh=False)  # type: ignore[arg-type]
        train(first, rank, of, stop=1)
        second = make_engine(base, after, workers, 1, fresh=False)  # type: ignore[arg-type]
        second.load_state(first.state(), 1)
        keep("resumed", second, train(second, rank, of, start=1))
    if rank == 0:
        (folder / f"preference-{workers}.json").write_text(json.dumps(told))
