from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.config import CapsSection
from serve.errors import BadRequestError
from serve.requests import Route, read_object, tokens_asked
from serve.requests import read_body as read_capped

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def read_body(route: Route, data: bytes) -> dict[str, Any]:
    return read_capped(route, data, CapsSection(), 512)


def test_a_good_body_is_passed_on_as_it_is() -> None:
    body = {**CHAT, "temperature": 0, "anything": [1, {"b": None}]}
    assert read_body("chat", json.dumps(body).encode()) == body


def test_text_parts_and_tool_calls_are_content() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "assistant", "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]
    assert read_body("chat", json.dumps({**CHAT, "messages": messages}).encode())["messages"] == messages


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"model": None}, "model: must be the id of a model, got nothing", "model"),
        ({"model": ["m"]}, "model: must be the id of a model, got a list", "model"),
        ({"messages": None}, "messages: must be a list of at least one message, got nothing", "messages"),
        ({"messages": []}, "messages: must be a list of at least one message, got an empty list", "messages"),
        ({"messages": [1]}, r"messages\[0\]: must be an object with role and content, got a number", "messages"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\]\.role: must be one of system, .* got nothing", "messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]\.content: must be a text or a list of parts", "messages"),
        (
            {"messages": [{"role": "user", "content": ["x"]}]},
            r"messages\[0\]\.content\[0\]: must be an obj",
            "messages",
        ),
        ({"chat_template": "x"}, "chat_template: may not be set; the server applies", "chat_template"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            r"chat_template_kwargs\.chat_template: may not be set; only enable_thinking may",
            "chat_template_kwargs",
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": 1}},
            "must be true or false, got a number",
            "chat_template_kwargs",
        ),
        ({"chat_template_kwargs": []}, "chat_template_kwargs: must be an object, got a list", "chat_template_kwargs"),
        ({"documents": [{"title": "x"}]}, "documents: may not be set; the server applies", "documents"),
        ({"add_generation_prompt": False}, "add_generation_prompt: may not be set", "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message: may not be set", "continue_final_message"),
        ({"add_special_tokens": True}, "add_special_tokens: may not be set", "add_special_tokens"),
        ({"priority": -1}, "priority: may not be set; all requests have the same", "priority"),
        (
            {"mm_processor_kwargs": {}},
            "mm_processor_kwargs: may not be set; this server takes text",
            "mm_processor_kwargs",
        ),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs: may not be set", "vllm_xargs"),
        ({"stream": "true"}, "stream: must be true or false, got a text", "stream"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            r"messages\[0\]\.content\[0\]: .* takes text only",
            "messages",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            r"messages\[0\]\.content\[0\]: ",
            "messages",
        ),
        ({"request_id": "x"}, "request_id: may not be set; send the header X-Request-ID", "request_id"),
    ],
)
def test_a_refusal_names_the_field(changes: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        read_body("chat", json.dumps({**CHAT, **changes}).encode())
    assert caught.value.param == param


def test_what_changes_nothing_may_be_said() -> None:
    harmless = {
        "add_generation_prompt": True,
        "continue_final_message": False,
        "add_special_tokens": False,
        "priority": 0,
        "chat_template": None,
        "chat_template_kwargs": {"enable_thinking": False},
        "stream": None,
    }
    body = {**CHAT, **harmless}
    assert read_body("chat", json.dumps(body).encode()) == body


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_are_finite(number: str) -> None:
    with pytest.raises(BadRequestError, match="is no finite number"):
        read_object(b'{"temperature": %b}' % number.encode())


@pytest.mark.parametrize(
    ("route", "body", "expected"),
    [
        ("chat", {}, (25, 256)),
        ("chat", {"max_tokens": 10}, (25, 10)),
        ("chat", {"max_tokens": 10, "max_completion_tokens": 20, "n": 3}, (25, 60)),
        ("completions", {"prompt": "x", "max_tokens": 0}, (25, 0)),
        ("completions", {"prompt": ["x", "y"], "max_tokens": 10, "n": 2}, (25, 40)),
        ("completions", {"prompt": [1, 2, 3], "max_tokens": 10}, (25, 10)),
        ("completions", {"prompt": [[1], [2], [3]], "max_tokens": 10}, (25, 30)),
        ("tokenize", {"prompt": "x"}, (25, 0)),
    ],
)
def test_what_a_request_will_take(route: Route, body: dict[str, Any], expected: tuple[int, int]) -> None:
    assert tokens_asked(route, body, 99) == expected


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b'"text"', b"[" * 200_000])
def test_what_is_no_object_is_refused(data: bytes) -> None:
    with pytest.raises(BadRequestError, match="the body"):
        read_body("completions", data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(["model", "messages", "chat_template", "chat_template_kwargs"]), json_values))
def test_any_json_is_either_read_or_refused(body: dict[str, Any]) -> None:
    try:
        read = read_body("chat", json.dumps(body).encode())
    except BadRequestError:
        return
    assert read == body
