"""Sends requests to the teacher, many at a time: from this process, or spread over Ray Data tasks."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from evals.client import Client, Request
from evals.errors import EvaluationError
from evals.records import RECORD, Record, line
from generate.config import TeacherSection

Asks = Callable[[Sequence[Request]], Iterator[Record]]
"""Sends requests and gives their records as they come; a teacher that is taken for dead is asked no further.

Raises:
    EvaluationError: no request to this endpoint can succeed.
"""
BLOCK = 4
"""A Ray task gets so many requests for each that it sends at a time. What a killed job lost is in its last blocks."""


def asks(teacher: TeacherSection, key: str | None) -> Asks:
    """The way of asking that the config names; a Ray must be connected where it is Ray's."""
    return partial(_on_ray if teacher.workers else here, teacher=teacher, key=key)


def here(requests: Sequence[Request], teacher: TeacherSection, key: str | None) -> Iterator[Record]:
    """Asks from this process."""

    async def opened() -> Client:
        return Client(
            teacher.url,
            key,
            timeout_s=teacher.timeout_s,
            tries=teacher.tries,
            per_minute=teacher.requests_per_minute,
        )

    with asyncio.Runner() as runner:
        client = runner.run(opened())
        records = client.ask_all(requests, teacher.concurrency)

        async def following() -> Record | None:
            return await anext(records, None)

        async def close() -> None:
            await records.aclose()
            await client.close()

        try:
            while (record := runner.run(following())) is not None:
                yield record
        finally:
            runner.run(close())


def _on_ray(requests: Sequence[Request], teacher: TeacherSection, key: str | None) -> Iterator[Record]:
    import ray.data

    each = -(-teacher.concurrency // teacher.workers)
    limit = teacher.requests_per_minute
    share = teacher.model_copy(update={"concurrency": each, "requests_per_minute": limit and limit / teacher.workers})
    blocks = -(-len(requests) // (BLOCK * each))
    ray.data.DataContext.get_current().enable_progress_bars = False
    asked = ray.data.from_items([{"request": _to_text(one)} for one in requests], override_num_blocks=blocks)
    # Waiting for a teacher takes next to no CPU.
    answered = asked.map_batches(
        partial(_ask_block, teacher=share, key=key),
        batch_size=None,
        num_cpus=0.1,
        compute=ray.data.TaskPoolStrategy(size=teacher.workers),
    )
    for batch in answered.iter_batches(batch_size=None, prefetch_batches=0):
        for record, fault in zip(batch["record"], batch["fault"], strict=True):
            if fault:
                raise EvaluationError(str(fault))
            yield RECORD.validate_json(str(record))


def _ask_block(batch: dict[str, Any], teacher: TeacherSection, key: str | None) -> dict[str, list[str]]:
    records: list[str] = []
    faults: list[str] = []
    try:
        for record in here([_of_text(text) for text in batch["request"]], teacher, key):
            records.append(line(record))
            faults.append("")
    except EvaluationError as error:
        records.append("")
        faults.append(str(error))
    return {"record": records, "fault": faults}


def _to_text(request: Request) -> str:
    return json.dumps(dataclasses.asdict(request), ensure_ascii=False)


def _of_text(text: str) -> Request:
    values = json.loads(text)
    return Request(Record(**values["record"]), values["body"], values["route"])
