"""A load generator for OpenAI-compatible servers: parallel streams, and when each of their tokens arrived.

It shares its cores with the server that it measures, so it reads HTTP off plain asyncio streams: a third of the CPU
time that a full HTTP client takes for each event.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

VERSION_HEADER = "x-raysft-version"
TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens on this machine, and the API key that it wants, if any."""

    port: int
    key: str | None = None


@dataclass(frozen=True, slots=True)
class Call:
    """One chat request, answered greedily and as a stream."""

    model: str
    prompt: str
    max_tokens: int
    ignore_eos: bool = True


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's answer. Times are seconds of `time.perf_counter`; rule: `error` is None, or the rest is partial."""

    call: Call
    begun_at: float
    ended_at: float
    arrivals: tuple[float, ...]
    """When text arrived: the first token, then one entry for each read that brought more."""
    text: str
    tokens: int
    version: str | None
    error: str | None

    @property
    def first_token_s(self) -> float:
        """From the request to the first text."""
        return self.arrivals[0] - self.begun_at

    @property
    def per_token_s(self) -> float:
        """Mean time of a token after the first."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(self.tokens - 1, 1)


async def ask(address: Address, call: Call) -> Answer:
    """Asks once; whatever goes wrong is in the answer's `error`."""
    begun_at = time.perf_counter()
    arrivals: list[float] = []
    texts: list[str] = []
    tokens, version, error, ended = 0, None, None, False
    body: dict[str, Any] = {
        "model": call.model,
        "messages": [{"role": "user", "content": call.prompt}],
        "max_tokens": call.max_tokens,
        "temperature": 0,
        "ignore_eos": call.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        async with asyncio.timeout(TIMEOUT_S):
            async with _sent(address, "POST", "/v1/chat/completions", body) as (status, headers, reader):
                version = headers.get(VERSION_HEADER)
                if status != 200:
                    text = b"".join([part async for part in _parts(reader, headers)])
                    raise OSError(f"{status}: {text.decode(errors='replace')[:300]}")
                left = b""
                async for part in _parts(reader, headers):
                    now = time.perf_counter()
                    *events, left = (left + part).split(b"\n\n")
                    said = ""
                    for event in _data(events):
                        if event is None:
                            ended = True
                            continue
                        if "error" in event:
                            raise OSError(f"in the stream: {event['error']}")
                        said += "".join(choice["delta"].get("content") or "" for choice in event["choices"])
                        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
                    if said:
                        arrivals.append(now)
                        texts.append(said)
        if not ended or not arrivals or not tokens:
            error = "the stream broke off"
    except TimeoutError:
        error = f"no whole answer within {TIMEOUT_S:g} s"
    except (OSError, EOFError, ValueError) as fault:
        error = str(fault) or type(fault).__name__
    return Answer(call, begun_at, time.perf_counter(), tuple(arrivals), "".join(texts), tokens, version, error)


async def fetch(address: Address, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of a plain request.

    Raises:
        OSError: the server does not listen, or breaks off.
    """
    try:
        async with _sent(address, method, path, body) as (status, headers, reader):
            text = b"".join([part async for part in _parts(reader, headers)])
    except EOFError as error:
        raise OSError("the server broke off") from error
    return status, json.loads(text) if headers.get("content-type", "").startswith("application/json") else None


async def run_calls(address: Address, calls: Sequence[Call], streams: int) -> tuple[float, list[Answer]]:
    """Asks all, a number of them at a time.

    Returns:
        Seconds from the first request to the last answer, and the answers in the order of the calls.
    """
    waiting = iter(enumerate(calls))
    answers: dict[int, Answer] = {}

    async def stream() -> None:
        for number, call in waiting:
            answers[number] = await ask(address, call)

    begun_at = time.perf_counter()
    await asyncio.gather(*(stream() for _ in range(streams)))
    return time.perf_counter() - begun_at, [answers[number] for number in range(len(calls))]


def figures(seconds: float, answers: Sequence[Answer]) -> dict[str, Any]:
    """Throughput and times of a load; failed requests are counted, and leave no times.

    Returns:
        `tokens_per_s`, and p50 and p99 in milliseconds of: `first_token_ms`; `per_token_ms`, each request's mean; and
        `pause_ms`, between any two arrivals of text as a reader sees them.
    """
    whole = [answer for answer in answers if answer.error is None]
    pauses = [after - before for a in whole for before, after in zip(a.arrivals, a.arrivals[1:], strict=False)]
    return {
        "requests": len(answers),
        "failed": len(answers) - len(whole),
        "tokens": sum(answer.tokens for answer in whole),
        "seconds": round(seconds, 3),
        "tokens_per_s": round(sum(answer.tokens for answer in whole) / seconds, 2),
        "first_token_ms": middle_and_tail([answer.first_token_s for answer in whole]),
        "per_token_ms": middle_and_tail([answer.per_token_s for answer in whole]),
        "pause_ms": middle_and_tail(pauses),
    }


def middle_and_tail(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds; empty for nothing."""
    return {f"p{share}": round(1000 * percentile(seconds, share), 2) for share in (50, 99)} if seconds else {}


def percentile(values: Sequence[float], share: int) -> float:
    """The smallest value that at least this percentage of all values does not exceed."""
    return sorted(values)[max(math.ceil(share * len(values) / 100), 1) - 1]


@asynccontextmanager
async def _sent(
    address: Address, method: str, path: str, body: dict[str, Any] | None
) -> AsyncIterator[tuple[int, dict[str, str], asyncio.StreamReader]]:
    """Sends a request on a connection of its own, and reads the head of the answer."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{address.port}", "Connection: close"]
    lines += [f"Content-Length: {len(data)}", "Content-Type: application/json"]
    lines += [f"Authorization: Bearer {address.key}"] if address.key else []
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port)
    try:
        writer.write("\r\n".join([*lines, "", ""]).encode() + data)
        first, *fields = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        pairs = (field.partition(":") for field in fields)
        yield int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}, reader
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _parts(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """A body as it arrives.

    Raises:
        EOFError: it broke off.
    """
    if headers.get("transfer-encoding", "").lower() != "chunked":
        yield await reader.readexactly(int(headers.get("content-length", 0)))
        return
    while size := int((await reader.readuntil(b"\r\n")), 16):
        yield (await reader.readexactly(size + 2))[:-2]


def _data(events: Sequence[bytes]) -> Iterator[dict[str, Any] | None]:
    """Server-sent events -> their JSON; None for the one that ends a stream."""
    for event in events:
        data = event.strip().removeprefix(b"data:").strip()
        yield None if data == b"[DONE]" else json.loads(data)
