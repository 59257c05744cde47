"""`python -m jobs.make_tasks --out FOLDER`: a FLAN-style set of many tasks in clusters, made by generators."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from jobs import cli
from sft.errors import DataError
from sft.rowkey import salt

DESCRIPTION = """Make instruction data of about a hundred tasks in twelve clusters, with answers that are right by
construction: one file a task, FOLDER/CLUSTER/TASK.jsonl, and an index, FOLDER/tasks.json. The same seed makes the same
rows. Needs the package reasoning_gym.
"""
INDEX = "tasks.json"
TRIES = 2
"""Rows that are generated for each row asked for, at most: generators repeat themselves."""
STILL_S = 10.0
LEFT_OUT = {
    "codeio": "it runs program text that a model wrote, and its rows differ from run to run",
    "composite": "it is made of other tasks",
    "knight_swap": "its rows differ from run to run",
}

TEMPLATES = (
    "{question}",
    "Work out the following {kind}.\n\n{question}",
    "{question}\n\nWhat is the answer?",
    "Question: {question}\nAnswer:",
    "Answer this {kind} with nothing but the result.\n\n{question}",
    "{question}\n\nGive the answer only, without an explanation.",
    "Task: {title}\n\n{question}",
    "Here is your next {kind}:\n\n{question}",
    "Can you solve this?\n\n{question}",
    "{question}\n\nPlease answer.",
)
"""Ten ways to put a question, as FLAN has for each of its data sets; a row's `template_id` counts them from 0."""
KINDS = {
    "algebra": "algebra problem",
    "algorithmic": "exercise",
    "arc": "pattern puzzle",
    "arithmetic": "arithmetic problem",
    "code": "question about code",
    "cognition": "question",
    "games": "puzzle",
    "geometry": "geometry problem",
    "graphs": "graph problem",
    "induction": "question about a hidden rule",
    "logic": "logic problem",
    "probability": "question about chance",
}


@dataclass(frozen=True, slots=True)
class Made:
    """What became of a task: where its rows are, or why it was left out."""

    task: str
    cluster: str
    rows: int = 0
    skipped: int = 0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    left_out: str = ""
    seconds: float = 0.0

    @property
    def file(self) -> str:
        """The task's file, below the set's folder."""
        return f"{self.cluster}/{self.task}.jsonl"


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the set: whole, or not at all."""
    made = argparse.ArgumentParser(prog="python -m jobs.make_tasks", description=DESCRIPTION, allow_abbrev=False)
    made.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="folder to make; must not exist")
    made.add_argument("--rows-per-task", metavar="N", type=_positive, default=500, help="rows a task (default: 500)")
    made.add_argument("--seed", metavar="S", type=int, default=0, help="another seed, other rows (default: 0)")
    made.add_argument("--tasks", metavar="TASK", nargs="+", help="only these tasks (default: all)")
    arguments = made.parse_args(argv)
    out: Path = arguments.out
    if out.exists():
        raise DataError(f"{out} exists already: remove it, or name another folder with --out")
    tasks = _chosen(arguments.tasks)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        results = sorted(_make_all(tasks, work, arguments.rows_per_task, arguments.seed), key=lambda one: one.file)
        index = _index(results, arguments.rows_per_task, arguments.seed)
        (work / INDEX).write_text(json.dumps(index, indent=1, default=str) + "\n", encoding="utf-8")
        work.chmod(0o755)
        work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    clusters = {one["cluster"] for one in index["tasks"]}
    print(
        f"{out}: {index['rows']:,} rows of {len(index['tasks'])} tasks in {len(clusters)} clusters; "
        f"{len(index['left_out'])} tasks left out (see {INDEX})"
    )
    return 0


def make_task(task: str, folder: Path, rows: int, seed: int) -> Made:
    """Writes one task's rows. The rows are a function of (task, rows, seed) under one PYTHONHASHSEED."""
    begun = time.monotonic()
    dataset_class, _ = _registered()[task]
    cluster = dataset_class.__module__.split(".")[1]
    if task in LEFT_OUT:
        return Made(task, cluster, left_out=LEFT_OUT[task])
    # Most generators seed row i with `seed + i`: seeds that lie apart keep two sets from sharing rows.
    dataset = _gym().create_dataset(task, seed=salt(seed, task) >> 33, size=TRIES * rows)
    choose = random.Random(salt(seed, task, "template"))
    lines: list[str] = []
    seen: set[str] = set()
    for number in range(TRIES * rows):
        random.seed(salt(seed, task, number))  # for generators that draw from Python's own
        try:
            item = dataset[number]
        except Exception as error:  # what a generator may raise is not documented
            return Made(task, cluster, left_out=f"its generator fails at row {number} ({type(error).__name__})")
        question, answer = item["question"], item["answer"]
        if answer is None:
            return Made(task, cluster, left_out="it has no single answer")
        if question in seen or not _is_right(dataset, item):
            continue
        seen.add(question)
        template = choose.randrange(len(TEMPLATES))
        instruction = TEMPLATES[template].format(
            question=question, kind=KINDS.get(cluster, "problem"), title=task.replace("_", " ")
        )
        row = {
            "instruction": instruction,
            "output": answer,
            "task": task,
            "cluster": cluster,
            "template_id": template,
            "index": number,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if len(lines) == rows:
            break
    path = folder / cluster / f"{task}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    settings = dataclasses.asdict(dataset.config)
    return Made(task, cluster, len(lines), number + 1 - len(lines), settings, seconds=time.monotonic() - begun)


def _make_all(tasks: Sequence[str], folder: Path, rows: int, seed: int) -> Iterator[Made]:
    done = 0
    with _pool(min(len(os.sched_getaffinity(0)), len(tasks))) as pool:
        waiting: dict[Future[Made], str] = {pool.submit(_quietly, task, folder, rows, seed): task for task in tasks}
        while waiting:
            finished, _ = wait(waiting, STILL_S, FIRST_COMPLETED)
            if not finished:
                print(f"still at {', '.join(list(waiting.values())[:3])}; {len(waiting)} tasks to go", flush=True)
            for future in finished:
                done += 1
                print(f"[{done:3}/{len(tasks)}] {_line(future.result())}", flush=True)
                del waiting[future]
                yield future.result()


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes whose sets of strings have one order: some generators draw from such sets."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    pool = ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL)
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        if before is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = before


def _quietly(task: str, folder: Path, rows: int, seed: int) -> Made:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # some generators print
        return make_task(task, folder, rows, seed)


def _line(made: Made) -> str:
    if made.left_out:
        return f"{made.cluster}/{made.task}: left out, {made.left_out}"
    skipped = f", {made.skipped} skipped" if made.skipped else ""
    return f"{made.cluster}/{made.task}: {made.rows} rows{skipped} in {made.seconds:.1f} s"


def _index(results: Sequence[Made], rows: int, seed: int) -> dict[str, Any]:
    kept = [one for one in results if not one.left_out]
    return {
        "generator": f"reasoning_gym {importlib.metadata.version('reasoning_gym')}",
        "seed": seed,
        "rows_per_task": rows,
        "rows": sum(one.rows for one in kept),
        "templates": TEMPLATES,
        "tasks": [
            {
                "task": one.task,
                "cluster": one.cluster,
                "file": one.file,
                "rows": one.rows,
                "skipped": one.skipped,
                "settings": one.settings,
            }
            for one in kept
        ],
        "left_out": {one.task: one.left_out for one in results if one.left_out},
    }


def _is_right(dataset: Any, item: dict[str, Any]) -> bool:
    """Whether the answer is a text that the task's own verifier takes for right."""
    answer = item["answer"]
    return isinstance(answer, str) and bool(answer.strip()) and dataset.score_answer(answer, item) == 1


def _chosen(names: Sequence[str] | None) -> list[str]:
    known = _registered()
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(sorted(known))}"
            raise DataError(f"there is no task {name}{hint}")
    return sorted(set(names) if names else known)


def _registered() -> dict[str, Any]:
    """The package's registry: by task, the classes of its data set and of its settings."""
    _gym()
    registry: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
    return registry


def _gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"making tasks needs reasoning_gym and what it needs itself ({error}): run `make setup-tasks`, or "
            "`pip install --no-deps -r requirements/tasks.txt`"
        ) from None


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of 1 or more, got {text!r}")
    return int(text)


if __name__ == "__main__":
    cli.run(main)
