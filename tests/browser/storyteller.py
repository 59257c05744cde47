"""A stand-in for an engine that answers chats as vLLM does: in a stream, a token at a time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from serve.items import DONE, Final, Usage
from serve.traffic import Target
from tests.serve.stand_in import Part, StandIn

PAUSE_S = 0.02


class Storyteller(StandIn):
    """Tells a story and who tells it; every answer waits after its first two words while `go_on` is clear."""

    def __init__(self) -> None:
        super().__init__()
        self.story = "Once upon a time"
        self.go_on = asyncio.Event()
        self.go_on.set()

    def own_items(self, target: Target) -> Sequence[Part]:
        words = f"{self.story}, said {target}.".split(" ")
        parts: list[Part] = []
        for index, word in enumerate(words):
            parts += [event({"content": f" {word}" if index else word}), PAUSE_S]
        return [*parts[:4], self.go_on, *parts[4:], ending(len(words))]


def event(delta: dict[str, Any], reason: str | None = None) -> str:
    """One event of a stream."""
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': reason}]})}\n\n"


def ending(tokens: int, reason: str = "stop") -> Final:
    """The last events of a stream."""
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": tokens}})
    return Final(f"{event({}, reason)}data: {usage}\n\n{DONE}", Usage(7, tokens, reason))
