"""The access log: a JSON line for each request, each shadow copy and each change by an administrator.

It holds no prompt by default, and never an answer.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from serve.items import Usage

CLIENT_GONE = 499
"""Status of a request whose client did not wait for the answer, as web servers log it; nobody receives it."""

QUIET = ("/health", "/metrics")
"""Probes ask for these every few seconds: only their failures get a line."""

logger = logging.getLogger("ray.serve")


@dataclass(slots=True)
class Record:
    """What becomes known of one request while it is worked on. Moments are of `time.monotonic`, in seconds."""

    request_id: str
    method: str
    path: str
    began: float
    key: str | None = None
    model: str | None = None
    version: str | None = None
    part: str | None = None
    prompt: Any = None
    stream: bool = False
    status: int = 0
    error: str | None = None
    limit: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    first_token_at: float | None = None
    ended_at: float | None = None

    def hear(self) -> None:
        """Notes the first token, of a stream."""
        if self.stream and self.first_token_at is None:
            self.first_token_at = time.monotonic()

    def end(self, usage: Usage | None) -> None:
        """Notes that the answer is whole, and what it took."""
        self.ended_at = time.monotonic()
        if usage is not None:
            self.prompt_tokens, self.completion_tokens = usage.prompt_tokens, usage.completion_tokens
            self.finish_reason = usage.finish_reason

    @property
    def total_s(self) -> float:
        """Seconds from the first byte in to the last byte out."""
        return (time.monotonic() if self.ended_at is None else self.ended_at) - self.began

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first token of a stream."""
        return None if self.first_token_at is None else self.first_token_at - self.began

    @property
    def per_token_s(self) -> float | None:
        """Seconds between two tokens of a stream."""
        if self.first_token_at is None or self.ended_at is None or (self.completion_tokens or 0) < 2:
            return None
        return (self.ended_at - self.first_token_at) / ((self.completion_tokens or 0) - 1)


class AccessLog:
    """Writes the lines.

    Args:
        file: where to; by default standard output.
        prompts: write what clients ask, too.
    """

    def __init__(self, file: str | None = None, *, prompts: bool = False) -> None:
        self.prompts = prompts
        self._file = file

    def request(self, record: Record) -> None:
        """Writes a request's line."""
        if record.path in QUIET and record.status == 200:
            return
        prompt = {"prompt": record.prompt} if self.prompts else {}
        self._write({"kind": "request", **_fields(record), **prompt})

    def shadow(self, record: Record) -> None:
        """Writes the line of a request's shadow copy, under that request's id."""
        self._write({"kind": "shadow", **_fields(record)})

    def audit(self, action: str, record: Record, **what: Any) -> None:
        """Writes that a key changed something."""
        self._write({"kind": "audit", "action": action, "request_id": record.request_id, "key": record.key, **what})

    def _write(self, fields: dict[str, Any]) -> None:
        try:
            write_line(self._file, fields)
        except OSError as error:
            logger.error("a line of the access log is lost: %s", error.strerror)


def write_line(path: str | None, fields: dict[str, Any]) -> None:
    """Adds a JSON line with the present time to a file, or to standard output.

    Raises:
        OSError: the file cannot be written.
    """
    line = json.dumps({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **fields})
    if path is None:
        print(line, flush=True)
        return
    # Opened anew for each line: a file that is moved away is left alone, and several gateways share one.
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _fields(record: Record) -> dict[str, Any]:
    return {
        "request_id": record.request_id,
        "key": record.key,
        "method": record.method,
        "path": record.path[:200],
        "model": record.model[:200] if record.model else None,
        "version": record.version,
        "part": record.part,
        "stream": record.stream,
        "status": record.status,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "finish_reason": record.finish_reason,
        "first_token_s": _rounded(record.first_token_s),
        "total_s": _rounded(record.total_s),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
