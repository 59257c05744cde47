"""Shadow copies: a request goes to a second version, too, whose answer is recorded and never returned.

A copy runs in the background: the client's answer neither waits for it nor fails with it, and it costs the client's key
nothing. Where too many run already, a request is not copied.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from contextlib import aclosing
from typing import Any

from serve.access_log import CLIENT_GONE, AccessLog, Record, write_line
from serve.config import ServeConfig
from serve.engines import Engine
from serve.errors import AnswerTimeoutError, Failure, NotReadyError, failure_of
from serve.items import Final, spoken
from serve.metrics import Metrics
from serve.question import Question
from serve.traffic import Target

STOPPED = "stopped"
"""Error of a copy that the gateway's own end cut short."""

logger = logging.getLogger("ray.serve")


class Witness:
    """Hears the answer that the client gets, as far as a copy needs to know of it.

    Args:
        keeps: whether to keep what it hears.
    """

    def __init__(self, *, keeps: bool) -> None:
        self._keeps = keeps
        self.texts: list[str] = []
        self.ended = asyncio.Event()

    def hear(self, text: str) -> None:
        """A part of the answer."""
        if self._keeps:
            self.texts.append(text)


class Shadows:
    """The shadow copies of one gateway.

    Args:
        engine: what answers them.
        config: the application's.
        log: takes a line of each.
        metrics: takes the counts.
    """

    def __init__(self, engine: Engine, config: ServeConfig, log: AccessLog, metrics: Metrics) -> None:
        self._engine, self._log, self._metrics = engine, log, metrics
        self._file, self._total_s = config.log.shadow_file, config.limits.total_s
        self._most = math.ceil(config.traffic.shadow_concurrency / config.scaling.gateway_replicas)
        self._running = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, question: Question, record: Record) -> Witness | None:
        """Starts the copy of a request that was let in, where it is to have one.

        Args:
            question: the request.
            record: its record, which is complete soon after the witness was told of the end.

        Returns:
            Whom to tell what the client gets, and when that has ended; None where there is no copy.
        """
        target = question.choice.shadow
        if target is None or question.route == "tokenize":
            return None
        if self._running >= self._most:
            self._metrics.dropped(record.model or "", str(target))
            return None
        self._running += 1
        witness = Witness(keeps=self._file is not None)
        task = asyncio.create_task(self._run(question, target, record, witness))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return witness

    async def close(self) -> None:
        """Ends all copies."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, question: Question, target: Target, asked: Record, witness: Witness) -> None:
        record = Record(asked.request_id, asked.method, asked.path, time.monotonic(), asked.key, asked.model)
        record.version, record.part, record.stream = str(target), "shadow", asked.stream
        texts: list[str] = []
        try:
            failure = await self._ask(question, target, record, texts)
            record.status = failure.status if failure else 200
            record.error = (failure.code or "refused_by_engine") if failure else None
        except asyncio.CancelledError:
            record.status, record.error = CLIENT_GONE, STOPPED
            raise
        finally:
            self._running -= 1
            if record.ended_at is None:
                record.ended_at = time.monotonic()
            self._metrics.observe(record, record.path)
            self._log.shadow(record)
        if self._file is not None:
            await witness.ended.wait()
            await asyncio.to_thread(self._compare, question, (asked, witness.texts), (record, texts))

    async def _ask(self, question: Question, target: Target, record: Record, texts: list[str]) -> Failure | None:
        """Collects the copy's answer; what went wrong is returned."""
        # An engine that works under the id already may refuse it a second time.
        items = self._engine.answer(question.route, question.body, target, f"{record.request_id}-shadow")
        try:
            async with asyncio.timeout(self._total_s), aclosing(items):
                async for item in items:
                    if isinstance(item, Failure):
                        return item
                    record.hear()
                    if self._file is not None:
                        texts.append(item.text if isinstance(item, Final) else item)
                    if isinstance(item, Final):
                        record.end(item.usage)
                        return None
        except TimeoutError:
            return failure_of(AnswerTimeoutError("the shadow's answer took too long"))
        except Exception as error:
            logger.exception("the shadow copy of request %s to %s failed", record.request_id, target)
            return failure_of(error)
        return failure_of(NotReadyError("the engine broke off its answer"))

    def _compare(self, question: Question, answer: tuple[Record, list[str]], shadow: tuple[Record, list[str]]) -> None:
        """Writes both answers to one request; reads them on a thread, as they may be long."""
        field = "messages" if question.route == "chat" else "prompt"
        fields: dict[str, Any] = {
            "request_id": answer[0].request_id,
            "model": answer[0].model,
            field: question.body.get(field),
            "answer": _told(*answer),
            "shadow": _told(*shadow),
        }
        try:
            write_line(self._file, fields)
        except OSError as error:
            logger.error("a line of log.shadow_file is lost: %s", error.strerror)


def _told(record: Record, texts: list[str]) -> dict[str, Any]:
    """One side of a comparison."""
    names = ("version", "part", "error", "finish_reason", "prompt_tokens", "completion_tokens")
    values = {name: getattr(record, name) for name in names}
    return {**values, "total_s": round(record.total_s, 4), "choices": spoken("".join(texts))}
