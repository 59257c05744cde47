"""Conversations for the tests of hygiene."""

from __future__ import annotations

import random
from collections.abc import Sequence

from sft.messages import Conversation, Message


def conversation(prompt: str, answer: str, reasoning: str | None = None) -> Conversation:
    return Conversation((Message("user", prompt), Message("assistant", answer, trained=True, reasoning=reasoning)))


def several_turns(*texts: str, system: str | None = None) -> Conversation:
    """The user and the assistant in turn; only the last turn is trained."""
    first = [Message("system", system)] if system is not None else []
    turns = [Message("user" if i % 2 == 0 else "assistant", text) for i, text in enumerate(texts[:-1])]
    return Conversation((*first, *turns, Message("assistant", texts[-1], trained=True)))


def vocabulary(rng: random.Random, size: int = 5000) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(size)]


def edited(rng: random.Random, words: Sequence[str], vocabulary: Sequence[str], edits: int) -> list[str]:
    """Puts other words in the place of some."""
    changed = list(words)
    for place in rng.sample(range(len(words)), edits):
        changed[place] = rng.choice(vocabulary)
    return changed


def jaccard(one: Sequence[str], other: Sequence[str], size: int = 5) -> float:
    """The true similarity of two texts' shingles."""
    first, second = (
        {tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1))} for words in (one, other)
    )
    return len(first & second) / len(first | second)
