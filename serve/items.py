"""What an engine sends a gateway of one answer. Pure; knows how vLLM writes its events, not vLLM."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from serve.errors import Failure

DONE = "data: [DONE]\n\n"
ERROR = 'data: {"error"'
USAGE = '"choices":[],'
"""Only the event with the usage has no choices. Inside JSON strings quotes are escaped, so no answer can fake it."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What an answer took, in tokens, and why it ended."""

    prompt_tokens: int
    completion_tokens: int
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Final:
    """The last text of an answer, and what the answer took where that is known."""

    text: str
    usage: Usage | None


Item = str | Final | Failure
"""Any number of texts of server-sent events, then one `Final`; or a `Failure`, which ends an answer."""


class EventJoiner:
    """Server-sent events of one answer -> items, as few as come together.

    The engine is always asked for the usage; a client that did not ask for it does not get to see it.

    Args:
        show_usage: whether the client asked for the usage.
    """

    def __init__(self, *, show_usage: bool) -> None:
        self._show_usage = show_usage
        self._usage: Usage | None = None
        self._before = ""

    def join(self, events: Sequence[str]) -> str | Final:
        """Joins events that came together, oldest first; none of them says an error."""
        text = "".join(events)
        if USAGE in text:
            index = next(index for index, event in enumerate(events) if USAGE in event)
            self._usage = _usage(events[index], events[index - 1] if index else self._before)
            if not self._show_usage:
                text = "".join((*events[:index], *events[index + 1 :]))
        self._before = events[-1]
        return Final(text, self._usage) if text.endswith(DONE) else text


def spoken(text: str) -> list[dict[str, Any]]:
    """What an answer says, choice by choice: `text`, and `reasoning` and `tool_calls` where it has any.

    Args:
        text: an answer's JSON object, or its events from the first on; empty where nothing came.
    """
    events = (event.removeprefix("data: ") for event in text.split("\n\n"))
    parts = [json.loads(event) for event in events if event.startswith("{")]
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for part in parts for choice in part.get("choices", ())):
        into = found.setdefault(choice.get("index", 0), {"text": ""})
        message = choice.get("message") or choice.get("delta") or {}
        into["text"] += choice.get("text") or message.get("content") or ""
        if message.get("reasoning"):
            into["reasoning"] = into.get("reasoning", "") + message["reasoning"]
        for place, call in enumerate(message.get("tool_calls") or ()):
            calls = into.setdefault("tool_calls", [])
            index = call.get("index", place)
            calls += [{"name": "", "arguments": ""} for _ in range(index + 1 - len(calls))]
            for field in ("name", "arguments"):
                calls[index][field] += (call.get("function") or {}).get(field) or ""
    return [found[index] for index in sorted(found)]


def _usage(event: str, before: str) -> Usage:
    """Reads the event with the usage; the one before it says why the answer ended."""
    usage = json.loads(event.removeprefix("data: "))["usage"]
    choices = json.loads(before.removeprefix("data: ")).get("choices") if before.startswith("data: {") else None
    reason = choices[-1].get("finish_reason") if choices else None
    return Usage(usage["prompt_tokens"], usage.get("completion_tokens") or 0, reason)
