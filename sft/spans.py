"""Where the trained turns lie in a rendered conversation.

A span is found by string differences: the prompt that the server would build for a turn must be a prefix of the whole
text, and so must the conversation up to the end of that turn. Where a template rewrites history this does not hold,
and the row is refused: nothing is searched for and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sft.messages import Message, Reason, RowError

THINK_END = "</think>"


class Span(NamedTuple):
    """A trained stretch of a text, half-open, in characters.

    Rule: where `prompt` is true, the text before `start` is exactly the prompt that a server would build for the turn,
    and the token ids before it must be that prompt's; else the stretch begins with the first whole token in it.
    """

    start: int
    end: int
    prompt: bool = True


class Rendered(NamedTuple):
    """A conversation as text, or the part of it up to one turn.

    Rule: `spans` are ascending and disjoint; each is one trained turn and its stop token. `turn` is the message that a
    part ends on, None for a whole conversation.
    """

    text: str
    spans: tuple[Span, ...]
    turn: int | None = None


def shared(one: str, other: str) -> str:
    """The longest text that both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.startswith(other[:middle]) else (low, middle - 1)
    return one[:low]


def find_spans(
    messages: Sequence[Message],
    stop_tokens: Sequence[str],
    render: Callable[[int, bool], str],
    before_content: Callable[[int], str],
) -> tuple[str, list[Span]]:
    """Finds the trained spans of a conversation.

    Args:
        messages: the conversation.
        stop_tokens: the texts that end an answer.
        render: renders the first n turns, with the generation prompt or without.
        before_content: the text before the content of a turn, for turns that no generation prompt opens.

    Returns:
        The conversation's text, and a span for each trained turn.

    Raises:
        RowError: a span cannot be known exactly, or the template refuses the conversation.
    """
    text = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if not message.trained:
            continue
        where = f"messages[{i}]"
        answer = message.role == "assistant"
        through = text if i == len(messages) - 1 else render(i + 1, False)
        before = render(i, True) if answer else before_content(i)
        if not through.startswith(before):
            raise RowError(Reason.NOT_MASKABLE, where, "the template's generation prompt is not how it opens this turn")
        # The turn's own text holds no stop token, so the first one ends it; what may follow is the template's.
        ends = [place + len(token) for token in stop_tokens if (place := through.find(token, len(before))) >= 0]
        if answer and not ends:
            raise RowError(Reason.NOT_MASKABLE, where, "the template does not end this turn with a stop token")
        end = min(ends, default=len(through))
        if not text.startswith(through[:end]):
            raise RowError(Reason.NOT_MASKABLE, where, "the template rewrites this turn when later turns follow")
        spans.append(Span(len(before), end, answer))
    return text, spans


def around_reasoning(text: str, messages: Sequence[Message], spans: Sequence[Span], *, trained: bool) -> Iterator[Span]:
    """Leaves the reasoning of trained turns out of their spans, unless it is trained.

    Raises:
        RowError: the template leaves out reasoning that the row has.
    """
    turns = (message for message in messages if message.trained)
    for message, span in zip(turns, spans, strict=True):
        turn = text[span.start : span.end]
        if message.reasoning is not None and message.reasoning.strip() not in turn:
            raise RowError(Reason.NOT_MASKABLE, "messages", "the template leaves out the reasoning of this turn")
        thought = turn.rfind(THINK_END)
        if trained or thought < 0:
            yield span
        else:
            yield Span(span.start + thought + len(THINK_END), span.end, prompt=False)
