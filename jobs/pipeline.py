"""`python -m jobs.pipeline --config FILE`: generate or read -> train -> evaluate -> gate -> promote, as one job."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from evals.gate import read_gate, read_gate_suites
from evals.suite import read_suites
from evals.summary import read_summary
from generate.config import GenerateConfig
from generate.run import ROWS, SUMMARY
from generate.summary import Summary as Generated
from jobs import cli, evaluate, generate, promotion
from jobs.cli import say
from jobs.endpoint import get, post, read_key, root
from jobs.pipeline_page import Loop, page
from jobs.publish import publish_once
from serve.registry import Registry
from serve.versions import AliasEntry, VersionId, check_name
from sft.config import TrainConfig, read_config
from sft.errors import ConfigError, RaysftError
from sft.section import Section

DESCRIPTION = """Make or read data, train an adapter, publish it, compare it with what an alias serves now, and promote
it if it passes a gate. A raysft server must be running on the same registry; its API key is read from RAYSFT_API_KEY.
Stopped anywhere, the same command goes on from there: every stage keeps what it has and does only what is missing.
Writes report.html into the output folder, whatever came out. Exit code 0 where the alias serves the new version, 1
where not, 2 where a configuration is wrong and nothing was begun.
"""
REPORT = "report.html"
EVALUATION = "evaluation"


class PipelineConfig(Section):
    """One turn of the loop."""

    generate: Path | None = Field(None, description="Config of jobs.generate, whose rows are trained on; null: none.")
    train: Path = Field(description="Config of jobs.train, with `registry` and without `alias`.")
    endpoint: str = Field("http://127.0.0.1:8000", description="Address of the raysft server.")
    alias: str = Field(description="The alias that is to serve the new version.")
    suite: list[Path] = Field(min_length=1, description="Suite files to compare on, or folders of them.")
    gate: Path = Field(description="Gate file that decides.")
    concurrency: int = Field(8, gt=0, description="Requests at a time.")
    output: Path = Field(description="Folder for the evaluation and the report page.")


class PipelineError(RaysftError):
    """The loop did not come to its end: the alias serves what it served before."""


@dataclass(frozen=True)
class Plan:
    """A pipeline whose configs are all sound."""

    config: PipelineConfig
    generation: GenerateConfig | None
    training: TrainConfig
    registry: str


Stage = Callable[[Plan, Loop], Loop]
Read = TypeVar("Read")


def main(argv: Sequence[str] | None = None) -> int:
    """The job."""
    _, config = cli.configure(cli.parser("pipeline", DESCRIPTION), PipelineConfig, argv)
    plan = check(config)
    _reach(config.endpoint)
    report = config.output / REPORT
    config.output.mkdir(parents=True, exist_ok=True)
    loop = Loop(alias=config.alias, endpoint=config.endpoint)
    stages = [(name, stage) for name, stage in STAGES.items() if plan.generation or name != "generate"]
    try:
        for number, (name, stage) in enumerate(stages, 1):
            say(f"\n== {number} of {len(stages)}: {name}")
            begin = time.perf_counter()
            loop = stage(plan, loop)
            loop = replace(loop, seconds={**loop.seconds, name: time.perf_counter() - begin})
    except RaysftError as error:
        loop = replace(loop, fault=str(error))
        raise
    except BaseException:
        loop = replace(loop, fault="it was stopped")
        raise
    finally:
        report.write_text(page(_with_findings(plan, loop), config.output), encoding="utf-8")
        say(f"report: {report}")
    return 0


def check(config: PipelineConfig) -> Plan:
    """Reads everything that the stages will read.

    Raises:
        ConfigError: with the faults of all files together.
    """
    faults: list[str] = []

    def sound(read: Callable[[], Read]) -> Read | None:
        try:
            return read()
        except ConfigError as error:
            faults.extend(f"{error.origin}: {fault}" for fault in error.faults)
        except RaysftError as error:
            faults.append(str(error))
        return None

    sound(lambda: check_name(config.alias))
    training = sound(lambda: read_config(TrainConfig, config.train))
    path = config.generate
    generation = sound(lambda: read_config(GenerateConfig, path)) if path else None
    gate = sound(lambda: read_gate(config.gate))
    if gate:
        sound(lambda: read_gate_suites(gate, config.gate))
    sound(lambda: read_suites(config.suite))
    if training:
        faults += _misfits(config, training, generation)
    if faults or training is None or training.registry is None:
        raise ConfigError("pipeline", faults)
    return Plan(config, generation, training, training.registry)


def _misfits(config: PipelineConfig, training: TrainConfig, generation: GenerateConfig | None) -> list[str]:
    found = []
    if training.registry is None:
        found.append(f"{config.train}: name the `registry` of the server: the version is published there")
    if training.alias is not None:
        found.append(
            f"{config.train}: leave `alias` out: the version is promoted only after its gate, to {config.alias}"
        )
    if generation:
        rows = generation.output / ROWS
        if not any(Path(source.path).absolute() == rows.absolute() for source in training.data.sources):
            found.append(f"{config.train}: none of data.sources has the path {rows}, where {config.generate} writes")
    return found


def _reach(endpoint: str) -> None:
    """Asks the server for anything: hours of work are not begun for one that is not there."""
    get(endpoint, read_key(None), "admin/aliases")


def _generate(plan: Plan, loop: Loop) -> Loop:
    assert plan.generation is not None
    if generate.main(["--config", str(plan.config.generate)]):
        raise PipelineError("generation gave too few rows, see above; the same command goes on where it ended")
    told = (plan.generation.output / SUMMARY).read_bytes()
    return replace(loop, generated=Generated.model_validate_json(told))


def _train(plan: Plan, loop: Loop) -> Loop:
    from sft.trainer import train  # PyTorch takes seconds to import, which a faulty config need not wait for

    result = train(plan.training, say)
    registry = Registry.open(plan.registry, create=True)
    version, new = publish_once(registry, result.bundle, plan.training.name)
    say(f"{'published' if new else 'published before:'} {version.id}")
    lineage = dict(version.bundle.lineage)
    return replace(loop, training=result, data=lineage["data"], version=version.id)


def _evaluate(plan: Plan, loop: Loop) -> Loop:
    config, version = plan.config, _version(loop)
    before = baseline(Registry.open(plan.registry).history(config.alias), version)
    prepared = post(config.endpoint, read_key(None), f"admin/versions/{version}/prepare", {})
    compared = str(before or prepared["base"])
    output = config.output / EVALUATION / f"{version}-{compared.replace('/', '-')}"
    words = ["--url", f"{root(config.endpoint)}/v1", "--models", f"{compared},{version}", "--output", str(output)]
    words += ["--suite", ",".join(map(str, config.suite)), "--concurrency", str(config.concurrency)]
    incomplete = evaluate.main(words)
    summary = read_summary(output / "summary.json")
    loop = replace(loop, before=before, compared=compared, evaluation=summary, evaluated=output)
    if incomplete:
        raise PipelineError("not every answer was scored, see above; the same command asks for those that are missing")
    return loop


def _promote(plan: Plan, loop: Loop) -> Loop:
    config, version = plan.config, _version(loop)
    reason = f"pipeline {config.output.name}"
    _, text = promotion.promote(config.endpoint, None, config.gate, config.alias, version, reason)
    say(text)
    return replace(loop, entry=Registry.open(plan.registry).alias(config.alias))


STAGES: dict[str, Stage] = {"generate": _generate, "train": _train, "evaluate": _evaluate, "promote": _promote}


def baseline(history: Sequence[AliasEntry], version: VersionId) -> VersionId | None:
    """What an alias served before a version, or serves, where it has not come to the version; None for nothing.

    Raises:
        PipelineError: it served the version and was moved away: this job does not bring back what was taken back.
    """
    if not history:
        return None
    last = history[-1]
    if last.version == version:
        return next(entry.previous for entry in reversed(history) if entry.previous != version)
    if any(entry.version == version for entry in history):
        why = f": {last.reason}" if last.reason else ""
        raise PipelineError(
            f"{last.alias} served {version} before, and serves {last.version} since its entry {last.number} "
            f"({last.action} by {last.by}{why}). Promote it by hand if that is over: python -m jobs.adapters promote "
            f"{version} --alias {last.alias}"
        )
    return last.version


def _with_findings(plan: Plan, loop: Loop) -> Loop:
    """Adds the newest evaluation that the gate kept with the version, passed or not.

    A registry that cannot be read now leaves it out: what ended the loop is to be told, rather than this.
    """
    if loop.version is None or loop.evaluation is None:
        return loop
    try:
        kept = Registry.open(plan.registry).evaluations(loop.version)
    except RaysftError as error:
        say(f"the report lacks the gate's findings: {error}")
        return loop
    return replace(loop, findings=kept[-1]) if kept else loop


def _version(loop: Loop) -> VersionId:
    assert loop.version is not None, "the stages run in order"
    return loop.version


if __name__ == "__main__":
    cli.run(main)
