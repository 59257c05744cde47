from __future__ import annotations

import pickle
from typing import Any

import pytest

from sft.formats import RowSpec, to_conversation
from sft.messages import Message, Reason, RowError

USER = Message("user", "Hi")
ANSWER = Message("assistant", "Hello", trained=True)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Hi", "output": "Hello"}, (USER, ANSWER)),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, (USER, ANSWER)),
        ({"instruction": "Hi", "input": None, "output": "Hello"}, (USER, ANSWER)),
        ({"instruction": "Hi", "input": "there", "output": "Hello"}, (Message("user", "Hi\n\nthere"), ANSWER)),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
            (USER, ANSWER),
        ),
        (
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ]
            },
            (Message("system", "Be brief."), USER, ANSWER, USER, ANSWER),
        ),
    ],
)
def test_converts(row: dict[str, Any], messages: tuple[Message, ...]) -> None:
    assert to_conversation(row).messages == messages


def turns(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ([1, 2], Reason.NOT_AN_OBJECT, ""),
        ("text", Reason.NOT_AN_OBJECT, ""),
        ({"prompt": "x"}, Reason.UNKNOWN_FORMAT, ""),
        ({"instruction": 7, "output": "x"}, Reason.WRONG_TYPE, "instruction"),
        ({"instruction": "x", "output": None}, Reason.MISSING_FIELD, "output"),
        ({"instruction": "x", "output": " \n"}, Reason.EMPTY_RESPONSE, "output"),
        ({"instruction": " ", "output": "x"}, Reason.EMPTY_PROMPT, "instruction"),
        ({"instruction": "x", "input": 3, "output": "x"}, Reason.WRONG_TYPE, "input"),
        ({"messages": "x"}, Reason.WRONG_TYPE, "messages"),
        ({"messages": ["x"]}, Reason.WRONG_TYPE, "messages[0]"),
        ({"messages": []}, Reason.NO_RESPONSE, "messages"),
        ({"messages": [{"role": "user"}]}, Reason.MISSING_FIELD, "messages[0].content"),
        (turns("user"), Reason.NO_RESPONSE, "messages"),
        (turns("user", "assistant", "user"), Reason.NO_RESPONSE, "messages"),
        (turns("assistant"), Reason.ROLE_ORDER, "messages[0].role"),
        (turns("system", "assistant"), Reason.ROLE_ORDER, "messages[1].role"),
        (turns("user", "user", "assistant"), Reason.ROLE_ORDER, "messages[1].role"),
        (turns("user", "system", "assistant"), Reason.ROLE_ORDER, "messages[1].role"),
        (turns("human", "gpt"), Reason.UNKNOWN_ROLE, "messages[0].role"),
    ],
)
def test_refuses(row: object, reason: Reason, field: str) -> None:
    with pytest.raises(RowError) as caught:
        to_conversation(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(RowError, match="messages: the field is missing"):
        to_conversation({"instruction": "x", "output": "y"}, RowSpec("openai"))


def test_an_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RowError(Reason.TOO_LONG, "messages", "9 tokens")))
    assert (error.reason, error.field, error.message) == (Reason.TOO_LONG, "messages", "9 tokens")
