from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.items import DONE, EventJoiner, Final, Usage, spoken


def event(content: str, reason: str | None = None) -> str:
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": reason}
    return sse({"id": "1", "model": "m", "choices": [choice]})


def sse(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, separators=(',', ':'), ensure_ascii=False)}\n\n"


USAGE = sse({"id": "1", "choices": [], "usage": {"prompt_tokens": 5, "total_tokens": 8, "completion_tokens": 3}})
EVENTS = [event(""), event("a"), event("b", "length"), USAGE, DONE]
LIKE_USAGE = '"choices":[],"usage":{"prompt_tokens":9}'


def run(joiner: EventJoiner, batches: list[list[str]]) -> tuple[str, Usage | None]:
    """Joins batches; only the last may be final."""
    items = [joiner.join(batch) for batch in batches]
    *texts, last = items
    assert isinstance(last, Final)
    assert all(isinstance(text, str) for text in texts)
    return "".join(str(text) for text in texts) + last.text, last.usage


@given(st.sets(st.integers(1, len(EVENTS) - 1)), st.booleans())
def test_however_the_events_come_the_stream_is_the_same(cuts: set[int], show: bool) -> None:
    edges = [0, *sorted(cuts), len(EVENTS)]
    batches = [EVENTS[start:end] for start, end in pairwise(edges)]
    text, usage = run(EventJoiner(show_usage=show), batches)
    assert text == "".join(each for each in EVENTS if show or each is not USAGE)
    assert usage == Usage(5, 3, "length")


@given(st.text() | st.just(LIKE_USAGE) | st.just(DONE) | st.just('data: {"error"'))
def test_no_answer_can_pass_for_the_usage_or_the_end(content: str) -> None:
    joiner = EventJoiner(show_usage=False)
    assert joiner.join([event(content)]) == event(content)
    assert run(joiner, [[event(content, "stop"), USAGE, DONE]]) == (event(content, "stop") + DONE, Usage(5, 3, "stop"))


@pytest.mark.parametrize("show", [False, True])
def test_usage_in_every_event_is_no_last_usage(show: bool) -> None:
    running = sse({"choices": [{"delta": {}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5}})
    joiner = EventJoiner(show_usage=show)
    assert joiner.join([running]) == running
    assert joiner.join([DONE]) == Final(DONE, None)


def test_an_end_without_a_reason() -> None:
    assert run(EventJoiner(show_usage=False), [[USAGE, DONE]])[1] == Usage(5, 3, None)


def chunks(*choices: dict[str, Any]) -> str:
    return "".join(sse({"id": "1", "choices": [choice]}) for choice in choices)


WIDE = "\u2028 b"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        (DONE, []),
        ('{"count": 3, "tokens": [1]}', []),
        ('{"choices": [{"index": 0, "text": "a"}, {"index": 1, "text": "b"}]}', [{"text": "a"}, {"text": "b"}]),
        (
            '{"choices": [{"index": 0, "message": {"content": null, "reasoning": "r"}}]}',
            [{"text": "", "reasoning": "r"}],
        ),
        (event("a") + event(WIDE) + USAGE + DONE, [{"text": f"a{WIDE}"}]),
        (
            chunks(
                {"index": 1, "delta": {"content": "x"}},
                {"index": 0, "delta": {"reasoning": "a"}},
                {"index": 0, "delta": {"reasoning": "b", "content": "c"}},
            ),
            [{"text": "c", "reasoning": "ab"}, {"text": "x"}],
        ),
        (
            chunks(
                {"index": 0, "delta": {"tool_calls": [{"index": 1, "function": {"name": "g", "arguments": ""}}]}},
                {"index": 0, "delta": {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]}},
                {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "1"}}]}},
            ),
            [{"text": "", "tool_calls": [{"name": "f", "arguments": "1"}, {"name": "g", "arguments": "{}"}]}],
        ),
    ],
)
def test_what_an_answer_says(text: str, said: list[dict[str, Any]]) -> None:
    assert spoken(text) == said
