from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.promises import HELD_IN, HELD_OUT
from evals.promises_proof import LeakError, Trained
from evals.suite import read_suites
from jobs.promises import PromisesConfig, check_configs, prepare, seeded
from jobs.promises_tasks import TasksSection, make_rows, make_suites, trained_rows
from serve.config import ServeConfig
from sft.config import TrainConfig, read_config
from sft.data_config import DataSection
from sft.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "jobs" / "configs" / "promises.yaml"
ADAPTERS = ("format", "procedures", "steps", "tasks")
CLUSTERS = {"chain_sum": "arithmetic", "syllogism": "logic"}


def shipped() -> tuple[PromisesConfig, dict[str, TrainConfig]]:
    config = read_config(PromisesConfig, CONFIG)
    return config, {name: read_config(TrainConfig, ROOT / path) for name, path in config.adapters.items()}


def tasks(folder: Path, *more: dict[str, Any]) -> TasksSection:
    """Generated rows as `jobs.make_tasks` leaves them: a row a task, and some more."""
    rows = [
        {"instruction": f"Solve it.\n\n{task} 0", "output": "1", "task": task, "cluster": cluster}
        for task, cluster in CLUSTERS.items()
    ]
    for row in (*rows, *more):
        path = folder / "tasks" / row["cluster"] / f"{row['task']}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
    found = [{"task": task, "cluster": cluster} for task, cluster in CLUSTERS.items()]
    (folder / "tasks" / "tasks.json").write_text(json.dumps({"tasks": found, "rows_per_task": 1, "seed": 0}))
    return TasksSection(
        folder=folder / "tasks",
        trained=["chain_sum"],
        held_out=["syllogism"],
        rows=1,
        asked_trained=2,
        asked_held_out=2,
    )


def data(folder: Path, held_out: str = "logic") -> DataSection:
    return DataSection.model_validate(
        {"sources": [{"path": str(folder / "tasks/*/*.jsonl")}], "hold_out": {"clusters": [held_out]}}
    )


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of suites that need no generator: task and number, scored by nothing."""

    def rows(task: str, count: int, _seed: int) -> list[dict[str, Any]]:
        entry = {"question": "", "answer": "1", "metadata": {}}
        return [
            {"id": f"{task}-{n}", "prompt": f"{task} {n // 2}", "reference": {"task": task, "entry": entry}}
            for n in range(count)
        ]

    monkeypatch.setattr("jobs.promises_tasks.gym_rows", rows)
    monkeypatch.setattr("evals.gym.fault_of", lambda *_: None)


def test_the_shipped_plan_fits_together() -> None:
    config, training = shipped()
    serving = read_config(ServeConfig, ROOT / config.serve)
    check_configs(training, serving)
    assert tuple(config.adapters) == ADAPTERS
    assert len(config.seeds) == 3
    assert serving.engine.resident_versions >= len(config.seeds) * len(config.adapters)
    assert training["tasks"].data.hold_out.clusters == ["geometry", "graphs", "logic"]
    one = seeded("format", training["format"], 7)
    assert (one.name, one.alias, one.train.seed) == ("format-seed-7", "format-seed-7", 7)


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    config, training = shipped()
    serving = read_config(ServeConfig, ROOT / config.serve)
    other = training["steps"].model_copy(update={"registry": "elsewhere"})
    with pytest.raises(ConfigError, match="steps: publishes to elsewhere, and build/evaluate/registry is served"):
        check_configs({**training, "steps": other}, serving)
    few = tmp_path / "few.yaml"
    few.write_text(CONFIG.read_text().replace("  steps: jobs/configs/promises-steps-train.yaml\n", ""))
    with pytest.raises(ConfigError, match="must name format, procedures, steps, tasks, got format, procedures, tasks"):
        read_config(PromisesConfig, few)


def test_rows_that_reach_training_are_read_without_held_out_ones(tmp_path: Path) -> None:
    tasks(tmp_path)
    assert list(trained_rows(data(tmp_path))) == [Trained("Solve it.\n\nchain_sum 0", "chain_sum", "arithmetic")]
    assert len(list(trained_rows(data(tmp_path, "games")))) == 2


@pytest.mark.usefixtures("questions")
def test_suites_of_tasks_ask_only_what_is_new_and_are_made_once(tmp_path: Path) -> None:
    section = tasks(tmp_path)
    assert make_rows(section) == {"syllogism": "logic"}
    paths = make_suites(section, tmp_path / "suites", list(trained_rows(data(tmp_path))))
    held_in, held_out = read_suites(paths)
    assert (held_in.name, held_out.name) == (HELD_IN, HELD_OUT)
    assert [row.messages[0]["content"] for row in held_in.rows] == ["chain_sum 1", "chain_sum 2"]
    assert [row.messages[0]["content"] for row in held_out.rows] == ["syllogism 0", "syllogism 1"]
    before = [path.stat().st_mtime_ns for path in paths]
    make_suites(section, tmp_path / "suites", [])
    assert [path.stat().st_mtime_ns for path in paths] == before
    more = section.model_copy(update={"asked_trained": 4})
    with pytest.raises(DataError, match="has only 3 questions that are not trained, and 4 are to be asked"):
        make_suites(more, tmp_path / "more", [Trained(f"chain_sum {n}") for n in range(5)])


def test_other_tasks_than_asked_for_are_refused(tmp_path: Path) -> None:
    section = tasks(tmp_path)
    with pytest.raises(DataError, match="holds other tasks or rows"):
        make_rows(section.model_copy(update={"rows": 2}))


@pytest.mark.usefixtures("questions")
def test_a_planted_leak_ends_the_job_before_anything_is_trained(tmp_path: Path) -> None:
    config, training = shipped()
    section = tasks(tmp_path)
    config = config.model_copy(
        update={"tasks": section, "output": tmp_path, "suites": [ROOT / suites for suites in config.suites]}
    )
    sources = {
        name: one.model_copy(update={"data": absolute(one.data) if name != "tasks" else data(tmp_path)})
        for name, one in training.items()
    }
    suites, proofs = prepare(config, sources)
    assert proofs["tasks"].held_out_clusters == ["logic"]
    assert {suite.name for suite in suites} >= {"format-json", "steps-on", HELD_OUT}
    planted = {"instruction": "Now:\nsyllogism  1?", "output": "1", "task": "chain_sum", "cluster": "arithmetic"}
    tasks(tmp_path, planted)
    with pytest.raises(LeakError, match="suite tasks-held-out: the question of row syllogism-3 is in the training"):
        prepare(config, sources)
    with pytest.raises(LeakError, match="cluster logic is held out and trained"):
        prepare(config, {**sources, "tasks": sources["tasks"].model_copy(update={"data": data(tmp_path, "games")})})


def absolute(section: DataSection) -> DataSection:
    sources = [source.model_copy(update={"path": str(ROOT / source.path)}) for source in section.sources]
    return section.model_copy(update={"sources": sources})
