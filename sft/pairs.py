"""Pairs of answers to one prompt, of which one is preferred: how their rows are read, and how two masks become one row.

A pair is one row from the file to the global batch. Whatever befalls one of its texts befalls the pair.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sft.mask import Masked
from sft.messages import Message, Reason, Role, RowError
from sft.tokens import Places
from sft.turns import arrange, read_completion, read_prompt

SIDES = ("chosen", "rejected")

Turns = tuple[Message, ...]


def read_pair(row: dict[str, Any], roles: Collection[Role]) -> tuple[Turns, Turns]:
    """Reads `{prompt, chosen, rejected}`, each a text or a list of messages, or `{chosen, rejected}` of two whole
    conversations, whose shared beginning is the prompt. Of the prompt nothing is trained.

    Returns:
        The conversation with the chosen answer, and that with the rejected one.

    Raises:
        RowError: a text is missing or empty, the prompts differ, or both answers are the same.
    """
    chosen, rejected = (read_completion(row.get(name), name, roles) for name in SIDES)
    prompt = row.get("prompt")
    whole = [bool(side) and side[0].role != "assistant" for side in (chosen, rejected)]
    if whole[0] != whole[1]:
        raise RowError(Reason.PROMPTS_DIFFER, "rejected", "one is a whole conversation, the other an answer alone")
    if whole[0]:
        opened = _shared(chosen, rejected)
        if prompt is not None and not _agrees(opened, prompt):
            raise RowError(Reason.PROMPTS_DIFFER, "prompt", "the conversations begin with another prompt")
        chosen, rejected = chosen[len(opened) :], rejected[len(opened) :]
    else:
        opened = read_prompt(prompt, "prompt")
    pair = arrange([*opened, *chosen], "chosen"), arrange([*opened, *rejected], "rejected")
    if pair[0] == pair[1]:
        raise _same()
    return pair


def join(masked: Masked) -> tuple[Masked, Places]:
    """Joins texts two by two: a pair is kept where both of its texts are, and cut where one of them is.

    Args:
        masked: chosen and rejected texts in turn.

    Returns:
        The pairs, and the place in each pair at which its rejected text begins.
    """
    starts = masked.starts
    errors = [_either(*both) for both in zip(masked.errors[::2], masked.errors[1::2], strict=True)]
    truncated = masked.truncated[::2] | masked.truncated[1::2]
    for i in np.flatnonzero(truncated):
        chosen, rejected = (masked.ids[starts[j] : starts[j + 1]] for j in (2 * i, 2 * i + 1))
        if errors[i] is None and np.array_equal(chosen, rejected):
            errors[i] = _same()
    good = np.fromiter((error is None for error in errors), np.bool_, len(errors))
    lengths = np.diff(starts)
    kept = np.repeat(np.repeat(good, 2), lengths)
    second = lengths[::2] * good
    ends = np.cumsum((lengths[::2] + lengths[1::2]) * good)
    weights = None if masked.weights is None else masked.weights[kept]
    joined = Masked(
        masked.ids[kept],
        masked.labels[kept],
        weights,
        np.concatenate([[0], ends]),
        truncated & good,
        tuple(errors),
    )
    return joined, second


def on_side(error: RowError, side: str) -> RowError:
    """The error of one text of a pair, whose place is named by the pair's own field."""
    return RowError(error.reason, error.field.replace("messages", side, 1) or side, error.message)


def _either(chosen: RowError | None, rejected: RowError | None) -> RowError | None:
    if chosen is not None:
        return on_side(chosen, "chosen")
    return None if rejected is None else on_side(rejected, "rejected")


def _shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> list[Message]:
    """The turns with which two conversations begin, up to the answers in which they differ."""
    sides = [[replace(turn, trained=False) for turn in side] for side in (chosen, rejected)]
    if sides[0] == sides[1]:
        raise _same()
    count = 0
    while count < min(map(len, sides)) and sides[0][count] == sides[1][count]:
        count += 1
    for name, side in zip(SIDES, sides, strict=True):
        if count == len(side):
            raise RowError(Reason.NO_RESPONSE, name, "the conversation ends where the other one goes on")
    for name, side in zip(SIDES, sides, strict=True):
        if side[count].role != "assistant":
            raise RowError(Reason.PROMPTS_DIFFER, f"{name}[{count}]", "the conversations differ before an answer")
    return sides[0][:count]


def _agrees(opened: Sequence[Message], prompt: object) -> bool:
    """Whether a prompt of its own is how two conversations begin; as a text it is one of their user turns."""
    turns = read_prompt(prompt, "prompt")
    return list(opened[: len(turns)]) == turns if isinstance(prompt, list) else turns[0] in opened


def _same() -> RowError:
    return RowError(Reason.CHOSEN_EQUALS_REJECTED, "rejected", "both answers are the same, so none is preferred")
