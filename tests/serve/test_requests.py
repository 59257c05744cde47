from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.errors import BadRequestError
from serve.requests import read_body

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


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
        ({"chat_template_kwargs": {"chat_template": "x"}}, r"chat_template_kwargs\.chat_template: may not", None),
        ({"request_id": "x"}, "request_id: may not be set; send the header X-Request-ID", "request_id"),
    ],
)
def test_a_refusal_names_the_field(changes: dict[str, Any], message: str, param: str | None) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        read_body("chat", json.dumps({**CHAT, **changes}).encode())
    assert caught.value.param == param


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
