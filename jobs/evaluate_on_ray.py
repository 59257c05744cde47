"""An evaluation in pieces on Ray Data: tasks ask and score, and what they hand back is in the order of one process."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evals.client import Client, Request
from evals.errors import EvaluationError
from evals.records import Key, Record
from evals.scoring import Scored, score_all
from evals.suite import Suite

PIECE = 64
"""Requests of one task: what is lost where the job is killed."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How an endpoint is asked; small and picklable. `concurrency` requests run at a time."""

    url: str
    key: str | None
    timeout_s: float
    tries: int
    concurrency: int


async def ask(asking: Asking, requests: Sequence[Request], keep: Callable[[Record], object]) -> None:
    """Asks from this process, and hands over each record as it comes.

    Raises:
        EvaluationError: no request to this endpoint can succeed.
    """
    client = Client(asking.url, asking.key, timeout_s=asking.timeout_s, tries=asking.tries)
    try:
        async for record in client.ask_all(requests, asking.concurrency):
            keep(record)
    finally:
        await client.close()


@contextmanager
def workers_on_ray(workers: int) -> Iterator[None]:
    """Joins a Ray cluster, or starts a small one for as long as it is needed."""
    import ray

    from sft.cluster import connect

    started = connect(None, num_cpus=None, needed_cpus=workers)
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def ask_on_ray(asking: Asking, requests: Sequence[Request], workers: int) -> Iterator[Record]:
    """Yields records piece by piece.

    Args:
        asking: how; its concurrency is shared out among the workers.
        requests: what.
        workers: tasks at a time, each with a process of its own.

    Raises:
        EvaluationError: no request to this endpoint can succeed; records that came before were yielded.
    """
    share = Asking(asking.url, asking.key, asking.timeout_s, asking.tries, max(1, asking.concurrency // workers))
    pieces = [requests[begin : begin + PIECE] for begin in range(0, len(requests), PIECE)]
    for records, fault in _mapped(lambda piece: _ask_piece(share, piece), pieces, workers):
        yield from records
        if fault:
            raise EvaluationError(fault)


def score_on_ray(
    suites: Sequence[Suite],
    models: Sequence[str],
    records: Mapping[Key, Record],
    thinking: bool | None,
    workers: int,
) -> Iterator[Scored]:
    """Scores as `score_all` does, each model on each suite as a task of its own."""
    pieces = [
        (suite, model, {key: record for key, record in records.items() if key[:2] == (suite.name, model)})
        for suite in suites
        for model in models
    ]
    for scored in _mapped(lambda piece: _score_piece(piece, thinking), pieces, workers):
        yield from scored


def _ask_piece(asking: Asking, requests: Sequence[Request]) -> tuple[list[Record], str]:
    records: list[Record] = []
    try:
        asyncio.run(ask(asking, requests, records.append))
    except EvaluationError as error:
        return records, str(error)
    return records, ""


def _score_piece(piece: tuple[Suite, str, dict[Key, Record]], thinking: bool | None) -> list[Scored]:
    suite, model, records = piece
    return list(score_all([suite], [model], records, thinking))


def _mapped(task: Callable[[Any], Any], pieces: Sequence[Any], workers: int) -> Iterator[Any]:
    """Runs a task over pieces, and yields what it makes of each, in their order."""
    if not pieces:
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"made": pickle.dumps(task(pickle.loads(row["piece"])))}

    rows = [{"piece": pickle.dumps(piece)} for piece in pieces]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    made = data.map(run, compute=ray.data.TaskPoolStrategy(size=workers), num_cpus=1)
    for row in made.iter_rows():
        yield pickle.loads(row["made"])
