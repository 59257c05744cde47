"""One answer on its way from an engine to a client, with all that can end it: time, limits, errors, a client that left.

Runs once a chunk of every stream, so a chunk is passed on as the text that it came as.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress
from dataclasses import replace

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serve.access_log import Record
from serve.config import LimitsSection
from serve.engines import Engine
from serve.errors import AnswerTimeoutError, Failure, NotReadyError, failure_of
from serve.guard import Guard
from serve.items import Final
from serve.limits import Headers, Lease, Limiter
from serve.question import Question
from serve.shadow import Shadows, Witness
from sft.errors import RaysftError

VERSION_HEADER = "x-raysft-version"
STREAM_HEADERS = (
    ("content-type", "text/event-stream; charset=utf-8"),
    ("cache-control", "no-cache"),
    ("x-accel-buffering", "no"),
)
LAST_WORDS_S = 5.0
TORN = ("client_gone", "timeout")
"""Errors after which the engine had worked, for nobody knows how many tokens."""

logger = logging.getLogger("ray.serve")


class Answer(Response):
    """Asks the engine and passes on what it says; what the client sees before the first item is still a real status."""

    def __init__(
        self,
        question: Question,
        engine: Engine,
        shadows: Shadows,
        guard: Guard,
        limiter: Limiter,
        limits: LimitsSection,
        record: Record,
    ) -> None:
        super().__init__()
        self._question, self._engine, self._shadows, self._guard = question, engine, shadows, guard
        self._limiter, self._limits, self._record = limiter, limits, record
        self._target = question.choice.target
        self._witnesses: list[Witness] = []
        self._started = False
        self._events = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002  (part of ASGI)
        """Works on the request until it is answered, or until nobody wants the answer.

        Raises:
            LimitError: the key has reached a limit.
            FullError: the server has.
        """
        question, record = self._question, self._record
        with self._limiter.admit(question.key, question.prompt_tokens + question.answer_tokens) as lease:
            client = _Client(receive)
            copied, checked = self._shadows.start(question, record), self._guard.listen(question)
            self._witnesses = [witness for witness in (copied, checked) if witness]
            try:
                failure = await self._attempt(send, lease, client)
                if failure and not client.served:
                    client.served = True
                    await self._fail(failure, lease.headers, send)
            except asyncio.CancelledError:
                record.error = "client_gone"
                if not client.forgive():
                    raise  # the server in front noticed first and cancels, too
            finally:
                client.stop()
                self._settle(lease)
                if copied:
                    copied.ended.set()
                self._guard.saw(question, record, checked)

    async def _attempt(self, send: Send, lease: Lease, client: _Client) -> Failure | None:
        """Passes the answer on; what went wrong is returned."""
        question, stream, first = self._question, self._record.stream, True
        total_s = self._limits.total_s
        first_s = min(self._limits.first_token_s, total_s) if stream else total_s
        items = self._engine.answer(question.route, question.body, self._target, self._record.request_id)
        ends_at = asyncio.get_running_loop().time() + total_s
        try:
            async with asyncio.timeout(first_s) as limit, aclosing(items):
                async for item in items:
                    if first:
                        first = False
                        limit.reschedule(ends_at)
                    if isinstance(item, Failure):
                        return item
                    await self._pass_on(item, lease.headers, send, client)
        except TimeoutError:
            what, allowed = ("the first token", first_s) if stream and first else ("the answer", total_s)
            return failure_of(AnswerTimeoutError(f"{what} took longer than the {allowed:g} s that this server allows"))
        except Exception as error:
            if not isinstance(error, RaysftError):
                logger.exception("request %s to %s failed", self._record.request_id, self._target)
            return failure_of(error)
        if not client.served:
            return failure_of(NotReadyError("the engine broke off its answer; try again"))
        return None

    async def _pass_on(self, item: str | Final, headers: Headers, send: Send, client: _Client) -> None:
        final = isinstance(item, Final)
        text = item.text if isinstance(item, Final) else item
        if isinstance(item, Final):
            self._record.end(item.usage)
            client.served = True
        body = text.encode()
        if not self._started:
            self._record.hear()
            own = STREAM_HEADERS if self._record.stream else _json_headers(len(body))
            await self._start(200, (*own, *headers), send)
        self._events += text.count("\n\n")
        for witness in self._witnesses:
            witness.hear(text)
        await send({"type": "http.response.body", "body": body, "more_body": not final})

    async def _fail(self, failure: Failure, headers: Headers, send: Send) -> None:
        """Tells the client: by a status, or in mid-stream by an event after which no [DONE] comes."""
        self._record.error = failure.code or "refused_by_engine"
        if failure.status >= 500:
            failure = replace(failure, message=f"{failure.message} (request {self._record.request_id})")
        body = json.dumps(failure.body()).encode()
        # A client that no longer reads must not keep its place, least of all after its time is up.
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WORDS_S):
                if self._started:
                    body = b"data: %b\n\n" % body
                else:
                    own = _json_headers(len(body))
                    await self._start(failure.status, (*own, *failure.headers, *headers), send)
                await send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: Headers, send: Send) -> None:
        self._started = True
        named = (*headers, (VERSION_HEADER, str(self._target)))
        raw = [(name.encode("latin-1"), value.encode("latin-1", "replace")) for name, value in named]
        await send({"type": "http.response.start", "status": status, "headers": raw})

    def _settle(self, lease: Lease) -> None:
        """Puts the reservation right; a torn stream took its prompt and about a token for each event."""
        record = self._record
        if record.prompt_tokens is not None and record.completion_tokens is not None:
            lease.settle(record.prompt_tokens + record.completion_tokens)
        elif record.error is not None and record.error not in TORN and not self._events:
            lease.settle(0)
        elif record.stream:
            record.completion_tokens = self._events
            lease.settle(self._question.prompt_tokens + self._events)


class _Client:
    """Cancels the present task when the client goes away before it was served."""

    def __init__(self, receive: Receive) -> None:
        self.served = False
        self._gone = False
        self._task = asyncio.current_task()
        self._watch = asyncio.create_task(self._wait(receive))

    async def _wait(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self.served and self._task is not None:
            self._gone = True
            self._task.cancel()

    def forgive(self) -> bool:
        """Takes the cancellation back; false if it was not this client's, or not only."""
        return self._gone and self._task is not None and self._task.uncancel() == 0

    def stop(self) -> None:
        """Lets the client go from now on."""
        self.served = True
        self._watch.cancel()


def _json_headers(length: int) -> Headers:
    return (("content-type", "application/json"), ("content-length", str(length)))
