"""The last proof of a version, on the engine itself: its prompts are training's, and it changes what the base says.

A load can succeed and do nothing, where names do not match: then the base model answers under the version's name.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from serve.errors import VersionRefusedError
from serve.versions import VersionId
from sft.adapter import MANIFEST, Golden

MARGIN = 4.0
"""How many times its own noise the base model's log-probabilities must move."""
LEAST = 1e-4
"""Least move of a log-probability that counts, in nats; float32 noise is below it."""

Tokenize = Callable[[Sequence[Mapping[str, Any]]], Awaitable[Sequence[int]]]
"""Messages -> the prompt ids that this server makes of them for the version."""
NextToken = Callable[[Sequence[int]], Awaitable[Mapping[int, float]]]
"""Prompt ids -> log-probabilities of the likeliest next tokens."""


async def prove(
    version: VersionId, golden: Sequence[Golden], tokenize: Tokenize, tuned: NextToken, base: NextToken
) -> None:
    """Proves a loaded version.

    Args:
        version: its id, for messages.
        golden: conversations with the prompt ids of training.
        tokenize: the server's own way from messages to ids.
        tuned: asks the version.
        base: asks the base model.

    Raises:
        VersionRefusedError: the prompts differ, or the version says what the base says on every golden prompt.
    """
    for index, example in enumerate(golden):
        if tuple(await tokenize(example.messages)) != example.prompt_ids:
            raise VersionRefusedError(
                f"{version} cannot be served: {MANIFEST}: golden.{index}.prompt_ids: the server makes other prompt ids "
                "of the same messages"
            )
    for example in golden:
        before, again = await base(example.prompt_ids), await base(example.prompt_ids)
        noise = distance(before, again)
        if distance(before, await tuned(example.prompt_ids)) > max(MARGIN * noise, LEAST):
            return
    raise VersionRefusedError(
        f"{version} cannot be served: it has no effect: on the manifest's golden prompts its log-probabilities are the "
        "base model's"
    )


def distance(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """The greatest difference of two distributions' log-probabilities; endless where their likeliest tokens differ."""
    common = one.keys() & other.keys()
    return max((abs(one[token] - other[token]) for token in common), default=float("inf"))
