"""Asks an OpenAI-compatible endpoint, many requests at a time, and never takes a failure for an answer."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Literal

import httpx

from evals.errors import EvaluationError
from evals.records import Record

AGAIN = frozenset({408, 409, 425, 429})
"""Statuses below 500 that may pass; of the others only 5xx do."""
HOPELESS = {
    401: "needs another API key: set RAYSFT_API_KEY",
    403: "refuses this API key: set RAYSFT_API_KEY to one that may use the models",
    404: "knows no such model, or is not an OpenAI-compatible endpoint (its address ends with /v1)",
}
LONGEST_WAIT_S = 60.0
"""An endpoint that asks for more patience than this is taken at its word: the request has failed."""
FAILED_IN_A_ROW = 20
"""After so many the endpoint is taken for dead, and the rest is not asked."""
DETAIL = 200

Route = Literal["chat/completions", "completions"]


@dataclass(frozen=True)
class Request:
    """One thing to ask. Rule: `record` is empty but for what was asked; `body` lacks the model."""

    record: Record
    body: Mapping[str, Any]
    route: Route = "chat/completions"


class Failure(Exception):  # noqa: N818  (one try's end, handled here)
    """A try that gave no answer. `wait_s` is what the endpoint asked for; None where another try is no use."""

    def __init__(self, reason: str, detail: str = "", again: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.detail, self.again, self.wait_s = reason, detail[:DETAIL], again, wait_s


class Client:
    """One endpoint.

    Args:
        url: its address, up to and with /v1.
        key: API key, if it wants one.
        timeout_s: how long one try may take, from the first byte sent to the last byte read.
        tries: how often a request is sent, at most.
        backoff_s: how long the first pause is; each further one is twice as long. A random part keeps requests that
            failed together from coming back together.
        per_minute: most requests a minute, spread evenly; None for as many as there are.
        transport: another way than the network; for tests.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        timeout_s: float,
        tries: int,
        backoff_s: float = 1.0,
        per_minute: float | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url = url.rstrip("/")
        self._timeout_s, self._tries, self._backoff_s = timeout_s, tries, backoff_s
        self._apart_s = 60 / per_minute if per_minute else 0.0
        self._free_at = 0.0
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # each try has one limit for all of it
            limits=httpx.Limits(max_connections=None),
            verify=_certificates(),
            transport=transport,
        )

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def ask(self, request: Request) -> Record:
        """Asks until there is an answer, or no hope for one.

        Raises:
            EvaluationError: no request to this endpoint can succeed: the key or the model is refused.
        """
        for tried in range(1, self._tries + 1):
            await self._turn()
            begun = time.monotonic()
            try:
                return replace(await self._try(request), tries=tried, seconds=round(time.monotonic() - begun, 3))
            except Failure as failure:
                wait_s = max(failure.wait_s, self._backoff_s * 2 ** (tried - 1) * random.uniform(0.75, 1.25))
                if tried == self._tries or not failure.again or failure.wait_s > LONGEST_WAIT_S:
                    return replace(request.record, failure=failure.reason, detail=failure.detail, tries=tried)
                await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
        raise AssertionError("at least one try is made")

    async def ask_all(self, requests: Sequence[Request], concurrency: int) -> AsyncGenerator[Record]:
        """Yields records as they come. Where too many failed in a row, the rest is not asked and has no record.

        Raises:
            EvaluationError: as `ask` does.
        """
        waiting = iter(requests)
        running: set[asyncio.Task[Record]] = set()
        failed = 0
        try:
            while True:
                while len(running) < concurrency and failed < FAILED_IN_A_ROW:
                    request = next(waiting, None)
                    if request is None:
                        break
                    running.add(asyncio.create_task(self.ask(request)))
                if not running:
                    return
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in sorted(done, key=lambda task: task.exception() is not None):  # answers are kept first
                    record = task.result()
                    failed = failed + 1 if is_outage(record.failure) else 0
                    yield record
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _turn(self) -> None:
        """Waits until the next request may go out."""
        now = time.monotonic()
        at = max(now, self._free_at)
        self._free_at = at + self._apart_s
        if at > now:
            await asyncio.sleep(at - now)

    async def _try(self, request: Request) -> Record:
        body = {"model": request.record.model, **request.body}
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.post(f"{self._url}/{request.route}", json=body)
        except TimeoutError:
            raise Failure("timeout", f"no answer within {self._timeout_s:g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise EvaluationError(f"{self._url} is no address: {error}") from None
        except httpx.HTTPError as error:
            raise Failure("connection", f"{type(error).__name__}: {error}") from None
        status = response.status_code
        if status in HOPELESS:
            raise EvaluationError(
                f"{self._url} answered {status} for {request.record.model}: it {HOPELESS[status]}. "
                f"It says: {_message(response)[:DETAIL]}"
            )
        if status != 200:
            again = status in AGAIN or status >= 500
            raise Failure(f"http_{status}", _message(response), again, _patience(response))
        return _read(request.record, response)


@cache
def _certificates() -> ssl.SSLContext:
    """Those of the machine: reading them takes longer than many a request, so a process does it once."""
    return httpx.create_ssl_context()


def _read(record: Record, response: httpx.Response) -> Record:
    """The answer in a response of OpenAI's shape."""
    try:
        body = response.json()
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
        usage = body.get("usage") or {}
        if not isinstance(text, str) or not isinstance(reasoning, str):
            raise TypeError
        return replace(
            record,
            text=_clean(text),
            reasoning=_clean(reasoning),
            finish_reason=str(choice.get("finish_reason") or ""),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
        )
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        raise Failure("broken_answer", "the body is no completion") from None


def _clean(text: str) -> str:
    """Half surrogate pairs, as cut-off emoji leave them, are no text that can be written."""
    return text.encode("utf-8", "replace").decode()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text.strip()


def _patience(response: httpx.Response) -> float:
    """Seconds that `Retry-After` asks for, as a number or a date; 0 where it says nothing that can be read."""
    value = response.headers.get("retry-after", "").strip()
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max(0.0, (until.replace(tzinfo=until.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def is_outage(failure: str) -> bool:
    """Whether a failure says that the endpoint, not the request, is the trouble."""
    return failure in ("timeout", "connection", "http_429") or failure.startswith("http_5")
