"""Generated tasks for the promises: rows to train, and suites of new rows of trained and of held-out tasks."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from evals.gym import gym_rows
from evals.promises import HELD_IN, HELD_OUT
from evals.promises_proof import Trained, trained_questions
from jobs import make_tasks
from sft.data_config import DataSection
from sft.errors import DataError
from sft.files import list_files, read
from sft.formats import RowSpec, to_conversation
from sft.messages import RowError
from sft.rows import parse
from sft.section import Section

GENERATED = 4
"""Questions that are generated for each that is asked: some are trained already, and are left out."""
DESCRIPTIONS = {
    HELD_IN: "New rows of generated tasks that were trained. The score is the verifier's; `holds`: the answer occurs.",
    HELD_OUT: "Generated tasks of clusters of which nothing was trained. Scored in the same way.",
}


class TasksSection(Section):
    """Which tasks are generated, and how many rows."""

    folder: Path = Field(description="Where `jobs.make_tasks` writes them; the training config reads them there.")
    trained: list[str] = Field(min_length=1, description="Tasks of reasoning_gym that are trained.")
    held_out: list[str] = Field(min_length=1, description="Tasks that are not, each of a cluster without trained ones.")
    rows: int = Field(60, gt=0, description="Rows of each task for training.")
    asked_trained: int = Field(8, gt=0, description="New rows of each trained task that are asked.")
    asked_held_out: int = Field(16, gt=0, description="Rows of each held-out task that are asked.")
    max_tokens: int = Field(48, gt=0, description="Longest answer to a task.")
    seed: int = Field(0, ge=0, description="Seed of the training rows; the questions' is another.")


def make_rows(config: TasksSection) -> dict[str, str]:
    """Makes the training rows, if they are not there.

    Returns:
        The cluster of each held-out task.

    Raises:
        DataError: reasoning_gym is not installed, or the folder holds other tasks.
    """
    index = config.folder / make_tasks.INDEX
    wanted = [*config.trained, *config.held_out]
    if not index.is_file():
        options = ["--out", str(config.folder), "--rows-per-task", str(config.rows), "--seed", str(config.seed)]
        make_tasks.main([*options, "--tasks", *wanted])
    made = json.loads(index.read_text(encoding="utf-8"))
    clusters = {one["task"]: one["cluster"] for one in made["tasks"]}
    if set(clusters) != set(wanted) or (made["rows_per_task"], made["seed"]) != (config.rows, config.seed):
        raise DataError(f"{config.folder} holds other tasks or rows than the config asks for: remove it")
    return {task: clusters[task] for task in config.held_out}


def make_suites(config: TasksSection, folder: Path, trained: Sequence[Trained]) -> list[Path]:
    """Writes both suites, if they are not there: each whole, or not at all.

    Args:
        config: the tasks.
        folder: where to.
        trained: rows whose questions are not asked.

    Raises:
        DataError: reasoning_gym is not installed, or a task has too few questions that are not trained.
    """
    sizes = {HELD_IN: (config.trained, config.asked_trained), HELD_OUT: (config.held_out, config.asked_held_out)}
    paths = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tasks, rows) in sizes.items():
        path = folder / f"{name}.yaml"
        paths.append(path)
        if path.is_file():
            continue
        asked = [_questions(task, rows, config.seed + 1, trained) for task in tasks]
        suite = {
            "name": name,
            "description": DESCRIPTIONS[name],
            "score": "right",
            "checkers": {"right": {"kind": "reasoning_gym"}},
            "generation": {"max_tokens": config.max_tokens},
            # Task after task in turn, so that the first rows of a suite are of all its tasks.
            "rows": [row for turn in zip(*asked, strict=True) for row in turn],
        }
        work = Path(tempfile.mkdtemp(prefix=".suite-", dir=folder)) / path.name
        work.write_text(yaml.safe_dump(suite, sort_keys=False, allow_unicode=True), encoding="utf-8")
        work.rename(path)
        shutil.rmtree(work.parent)
    return paths


def trained_rows(data: DataSection) -> Iterator[Trained]:
    """What the rows that reach training ask; held-out ones are not among them.

    Raises:
        RaysftError: a file cannot be read.
    """
    for source in data.sources:
        spec = RowSpec(source.format, tuple(source.columns.items()), tuple(data.mask.roles))
        for file in list_files(source.path, source.label):
            for table in read(file):
                for raw in table.column("raw").to_pylist():
                    try:
                        row = to_conversation(parse(raw), spec)
                    except RowError:
                        continue  # such a row is refused by the trainer, too
                    task, cluster = row.task or source.task or "", row.cluster or source.cluster or ""
                    if task in data.hold_out.tasks or cluster in data.hold_out.clusters:
                        continue
                    prompt = "\n".join(message.content for message in row.messages if message.role == "user")
                    yield Trained(prompt, task, cluster)


def _questions(task: str, rows: int, seed: int, trained: Sequence[Trained]) -> list[Mapping[str, Any]]:
    made = list(gym_rows(task, GENERATED * rows, seed))
    known = trained_questions((row["prompt"] for row in made), trained)
    new = {row["prompt"]: row for row in made if row["prompt"] not in known}
    if len(new) < rows:
        raise DataError(f"task {task} has only {len(new)} questions that are not trained, and {rows} are to be asked")
    answered = list(new.values())[:rows]
    return [
        {**row, "checkers": {"holds": {"kind": "contains", "reference": str(row["reference"]["entry"]["answer"])}}}
        for row in answered
    ]
