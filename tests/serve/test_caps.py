from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.caps import _too_deep, check_caps
from serve.config import CapsSection
from serve.errors import BadRequestError

CAPS = CapsSection(messages=3, prompts=2, n=4, stop=2, stop_chars=5, logit_bias=3, tools=2, schema_chars=60)


def nested(levels: int) -> Any:
    value: Any = "x"
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


def tool(name: str = "f", **parameters: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **({"parameters": parameters} if parameters else {})}}


LARGE = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"enum": ["x" * 60]}}}

AT_THE_LIMIT: list[dict[str, Any]] = [
    {},
    {"n": 4, "max_tokens": 512, "max_completion_tokens": 512},
    {"n": None, "max_tokens": None, "stop": None, "logit_bias": None, "tools": None, "response_format": None},
    {"max_tokens": 0},
    {"messages": [1, 2, 3]},
    {"prompt": ["a", "b"]},
    {"prompt": [[1], [2]]},
    {"prompt": list(range(100))},
    {"stop": ["12345", "12345"]},
    {"stop": "12345"},
    {"logit_bias": {"1": 1, "2": 1, "3": 1}, "stop_token_ids": [1, 2, 3]},
    {"tools": [tool(), tool()]},
    {"response_format": {"type": "json_object"}},
    {"structured_outputs": {"json": json.dumps({"a": 1})}},
    {"metadata": nested(35)},
]


@pytest.mark.parametrize("body", AT_THE_LIMIT, ids=str)
def test_what_is_at_the_limit_passes(body: dict[str, Any]) -> None:
    check_caps(body, CAPS, 512)


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"n": 5}, "n: 5 is above this server's limit of 4", "n"),
        ({"n": 10**30}, "n: a number of more than 12 digits is above", "n"),
        ({"n": 0}, "n: must be a whole number from 1 to 4", "n"),
        ({"n": "1000000"}, "n: must be a whole number", "n"),
        ({"n": 2.0}, "n: must be a whole number", "n"),
        ({"n": True}, "n: must be a whole number", "n"),
        ({"max_tokens": 513}, "max_tokens: 513 is above this server's limit of 512", "max_tokens"),
        ({"max_tokens": -1}, "max_tokens: must be a whole number from 0 to 512", "max_tokens"),
        ({"max_tokens": "600"}, "max_tokens: must be a whole number", "max_tokens"),
        ({"max_completion_tokens": 513}, "max_completion_tokens: 513", "max_completion_tokens"),
        ({"messages": [1] * 4}, "messages: 4 messages are above this server's limit of 3", "messages"),
        ({"prompt": ["a"] * 3}, "prompt: 3 prompts are above this server's limit of 2", "prompt"),
        ({"prompt": [[1]] * 3}, "prompt: 3 prompts", "prompt"),
        ({"stop": ["a"] * 3}, "stop: 3 texts are above", "stop"),
        ({"stop": "123456"}, "stop: a text of 6 characters is above", "stop"),
        ({"stop": ["a", "123456"]}, "stop: a text of 6 characters is above", "stop"),
        ({"logit_bias": dict.fromkeys("abcd", 1)}, "logit_bias: 4 entries are above", "logit_bias"),
        ({"stop_token_ids": [1] * 4}, "stop_token_ids: 4 entries", "stop_token_ids"),
        ({"allowed_token_ids": [1] * 4}, "allowed_token_ids: 4 entries", "allowed_token_ids"),
        ({"bad_words": ["a"] * 4}, "bad_words: 4 entries", "bad_words"),
        ({"tools": [tool()] * 3}, "tools: 3 tools are above", "tools"),
        ({"tools": [tool(), tool(a="x" * 60)]}, r"tools\[1\]: \d+ characters are above this server's limit", "tools"),
        ({"tools": [tool(), tool()], "tool_choice": "required"}, "tools: 89 characters are above", "tools"),
        ({"response_format": LARGE}, "response_format: 1.. characters are above", "response_format"),
        ({"structured_outputs": {"regex": "x" * 60}}, "structured_outputs: 72 characters", "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json: is not JSON", "structured_outputs"),
        (
            {"structured_outputs": {"json": "[" * 40 + "]" * 40}},
            "structured_outputs: 9. characters",
            "structured_outputs",
        ),
        ({"response_format": nested(36)}, "response_format: is nested deeper than 32 levels", "response_format"),
    ],
)
def test_what_is_above_is_named(body: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        check_caps(body, CAPS, 512)
    assert caught.value.param == param


def test_a_schema_in_a_text_is_no_deeper_than_one_in_the_body() -> None:
    caps = CapsSection(schema_depth=4)
    check_caps({"structured_outputs": {"json": json.dumps(nested(4))}}, caps, 512)
    with pytest.raises(BadRequestError, match=r"structured_outputs\.json: is nested deeper than 4 levels"):
        check_caps({"structured_outputs": {"json": json.dumps(nested(5))}}, caps, 512)


def test_nesting_beyond_recursion_is_refused() -> None:
    with pytest.raises(BadRequestError, match="x: is nested deeper than 32 levels"):
        check_caps({"x": nested(5000)}, CAPS, 512)


trees = st.recursive(st.none() | st.text(max_size=3), lambda t: st.lists(t, max_size=3) | st.dictionaries(st.text(), t))


def depth(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((depth(each) for each in inner), default=0)


@given(trees, st.integers(0, 8))
def test_depth_is_counted_without_recursion(tree: Any, levels: int) -> None:
    assert _too_deep(tree, levels) is (depth(tree) > levels)


def test_a_large_body_costs_little() -> None:
    body = {"prompt": list(range(500_000)), "messages": [{"role": "user", "content": "x" * 1_000_000}] * 3}
    began = time.process_time()
    check_caps(body, CAPS, 512)
    assert time.process_time() - began < 0.5
