from __future__ import annotations

import json
from typing import Any

import pytest

from sft.messages import Message, Reason, Role, RowError, ToolCall
from sft.turns import arrange, openai_turn, read_tools, read_turns, sharegpt_turn

ROLES: tuple[Role, ...] = ("assistant",)
USER = Message("user", "Hi")
ANSWER = Message("assistant", "Hello", trained=True)
CALL = ToolCall("add", {"a": 1, "b": [2]}, "c1")
CALLS = Message("assistant", "", trained=True, tool_calls=(CALL,))
RESULT = Message("tool", "3", tool_call_id="c1")


def openai(*turns: object) -> tuple[Message, ...]:
    return arrange(read_turns(list(turns), "messages", openai_turn, ROLES), "messages")


def sharegpt(*turns: tuple[str, str]) -> tuple[Message, ...]:
    value = [{"from": speaker, "value": text} for speaker, text in turns]
    return arrange(read_turns(value, "conversations", sharegpt_turn, ROLES), "conversations")


def said(role: str, content: object = "x", **fields: object) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def test_a_conversation_with_tools() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": [2]}'}}
    assert openai(
        said("developer", "Use tools."),
        said("user", "Hi"),
        said("assistant", None, tool_calls=[call], reasoning_content="Add them."),
        said("tool", "3", tool_call_id="c1", name="add"),
        said("assistant", "Hello", name="bot", tool_calls=[]),
    ) == (
        Message("system", "Use tools."),
        USER,
        Message("assistant", "", trained=True, reasoning="Add them.", tool_calls=(CALL,)),
        Message("tool", "3", tool_call_id="c1", name="add"),
        Message("assistant", "Hello", trained=True, name="bot"),
    )


@pytest.mark.parametrize("arguments", ['{"a": 1, "b": [2]}', {"a": 1, "b": [2]}])
@pytest.mark.parametrize("bare", [True, False])
def test_arguments_become_an_object_once(arguments: object, bare: bool) -> None:
    function = {"name": "add", "arguments": arguments}
    call = {"id": "c1", **function} if bare else {"id": "c1", "function": function}
    assert openai(said("user", "Hi"), {"role": "assistant", "tool_calls": [call]}) == (USER, CALLS)
    assert openai(said("user", "Hi"), {"role": "assistant", "tool_calls": json.dumps([call])}) == (USER, CALLS)


@pytest.mark.parametrize("arguments", [None, "", "{}", {}])
def test_a_call_without_arguments(arguments: object) -> None:
    turn = openai_turn(said("assistant", "", function_call={"name": "stop", "arguments": arguments}), ())
    assert turn == Message("assistant", "", tool_calls=(ToolCall("stop", {}),))


def test_several_results_follow_several_calls() -> None:
    other = ToolCall("add", {}, "c2")
    calls = [{"id": call.id, "function": {"name": "add", "arguments": call.arguments}} for call in (CALL, other)]
    assert openai(
        said("user", "Hi"),
        said("assistant", "Wait.", tool_calls=calls),
        said("tool", "", tool_call_id="c2"),
        said("function", "3"),
        said("assistant", "Hello"),
    )[1:] == (
        Message("assistant", "Wait.", trained=True, tool_calls=(CALL, other)),
        Message("tool", "", tool_call_id="c2"),
        Message("tool", "3"),
        ANSWER,
    )


def test_sharegpt_with_tools() -> None:
    call = '{"name": "add", "arguments": {"a": 1}}'
    made = ToolCall("add", {"a": 1})
    assert sharegpt(
        ("system", "Use tools."),
        ("human", "Hi"),
        ("function_call", f"[{call}, {call}]"),
        ("observation", "1"),
        ("tool", "1"),
        ("function_call", call),
        ("observation", "1"),
        ("bing", "Hello"),
    ) == (
        Message("system", "Use tools."),
        USER,
        Message("assistant", "", trained=True, tool_calls=(made, made)),
        Message("tool", "1"),
        Message("tool", "1"),
        Message("assistant", "", trained=True, tool_calls=(made,)),
        Message("tool", "1"),
        ANSWER,
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "Hi"}], "Hi"),
        ([{"type": "text", "text": "Hi"}, "there", {"text": "you"}], "Hi\nthere\nyou"),
        ("Hi", "Hi"),
    ],
)
def test_text_parts(content: object, text: str) -> None:
    assert openai_turn(said("user", content), ()) == Message("user", text)


@pytest.mark.parametrize(
    ("turn", "reasoning", "content"),
    [
        (said("assistant", "<think>\nA.\n\nB.\n</think>\n\nHello"), "A.\n\nB.", "Hello"),
        (said("assistant", "\n<think>A.</think>Hello"), "A.", "Hello"),
        (said("assistant", "<think>\n\n</think>\n\nHello"), "", "Hello"),
        (said("assistant", "Hello", reasoning_content="A."), "A.", "Hello"),
        (said("assistant", "Hello", reasoning="A."), "A.", "Hello"),
        (said("assistant", "Hello", reasoning=None, reasoning_content=""), None, "Hello"),
        (said("assistant", "Write <think>x</think>."), None, "Write <think>x</think>."),
        ({"from": "gpt", "value": "<think>A.</think> Hello"}, "A.", " Hello"),
    ],
)
def test_reasoning(turn: dict[str, Any], reasoning: str | None, content: str) -> None:
    assert sharegpt_turn(turn, ()) == Message("assistant", content, reasoning=reasoning)


def test_only_the_assistant_reasons() -> None:
    assert openai_turn(said("user", "<think>x</think>y"), ()).content == "<think>x</think>y"


@pytest.mark.parametrize(
    ("flags", "trained"),
    [
        ({}, (False, True)),
        ({"train": None, "weight": None}, (False, True)),
        ({"train": True}, (True, True)),
        ({"train": False}, (False, False)),
        ({"weight": 1}, (True, True)),
        ({"weight": 0.0}, (False, False)),
        ({"train": True, "weight": 0}, (True, True)),
    ],
)
def test_a_turn_says_itself_whether_it_is_trained(flags: dict[str, Any], trained: tuple[bool, ...]) -> None:
    turns = [said("user", **flags), said("assistant", **flags)]
    speakers = [{"from": "human", "value": "x", **flags}, {"from": "gpt", "value": "x", **flags}]
    for reader, value in ((openai_turn, turns), (sharegpt_turn, speakers)):
        assert tuple(turn.trained for turn in read_turns(value, "m", reader, ROLES)) == trained


def test_what_follows_the_last_trained_turn_is_cut() -> None:
    untrained = said("assistant", "Bye", train=False)
    assert openai(said("user", "Hi"), said("assistant", "Hello"), said("user"), untrained) == (USER, ANSWER)
    with pytest.raises(RowError) as caught:
        openai(said("user"), untrained)
    assert (caught.value.reason, caught.value.field) == (Reason.NOTHING_TRAINED, "messages")


WITH_CALL = (said("user"), said("assistant", "", tool_calls=[{"id": "c1", "name": "f"}]))


@pytest.mark.parametrize(
    ("turns", "reason", "field"),
    [
        (["x"], Reason.WRONG_TYPE, "messages[0]"),
        ([], Reason.NO_RESPONSE, "messages"),
        ([said("user", None)], Reason.MISSING_FIELD, "messages[0].content"),
        ([said("user", 7)], Reason.WRONG_TYPE, "messages[0].content"),
        ([said("user", " ")], Reason.EMPTY_PROMPT, "messages[0].content"),
        ([said("user", [])], Reason.EMPTY_PROMPT, "messages[0].content"),
        ([said("user", "a\udfff")], Reason.INVALID_ENCODING, "messages[0].content"),
        ([said("user", [{"type": "image_url"}])], Reason.UNSUPPORTED_CONTENT, "messages[0].content[0]"),
        ([said("user", ["x", {"type": "text"}])], Reason.MISSING_FIELD, "messages[0].content[1].text"),
        ([said("user"), said("assistant", "")], Reason.EMPTY_RESPONSE, "messages[1].content"),
        ([said("user"), said("assistant", None)], Reason.MISSING_FIELD, "messages[1].content"),
        ([said("user"), said("assistant", "<think>A.</think>\n")], Reason.EMPTY_RESPONSE, "messages[1].content"),
        ([said("user"), said("assistant", "<think>A.")], Reason.UNCLOSED_REASONING, "messages[1].content"),
        ([said("assistant", "<think>A.</think>x", reasoning="A.")], Reason.WRONG_TYPE, "messages[0].content"),
        ([said("assistant", "x", reasoning=7)], Reason.WRONG_TYPE, "messages[0].reasoning_content"),
        ([said("human")], Reason.UNKNOWN_ROLE, "messages[0].role"),
        ([{"content": "x"}], Reason.MISSING_FIELD, "messages[0].role"),
        ([said("user", train=1)], Reason.WRONG_TYPE, "messages[0].train"),
        ([said("user", weight=0.5)], Reason.WRONG_TYPE, "messages[0].weight"),
        ([said("user", name=7)], Reason.WRONG_TYPE, "messages[0].name"),
        ([said("user")], Reason.NO_RESPONSE, "messages"),
        ([said("user"), said("assistant"), said("user")], Reason.NO_RESPONSE, "messages"),
        ([*WITH_CALL, said("tool")], Reason.NO_RESPONSE, "messages"),
        ([said("assistant")], Reason.ROLE_ORDER, "messages[0]"),
        ([said("system"), said("assistant")], Reason.ROLE_ORDER, "messages[1]"),
        ([said("user"), said("user"), said("assistant")], Reason.ROLE_ORDER, "messages[1]"),
        ([said("user"), said("system"), said("assistant")], Reason.ROLE_ORDER, "messages[1]"),
        ([said("system"), said("system"), said("user")], Reason.ROLE_ORDER, "messages[1]"),
        ([said("user"), said("assistant"), said("tool")], Reason.ROLE_ORDER, "messages[2]"),
        ([*WITH_CALL, said("user"), said("assistant")], Reason.ROLE_ORDER, "messages[2]"),
        ([*WITH_CALL, said("tool", tool_call_id="c2")], Reason.UNKNOWN_TOOL_CALL, "messages[2].tool_call_id"),
        ([*WITH_CALL, said("tool", tool_call_id=1)], Reason.WRONG_TYPE, "messages[2].tool_call_id"),
        ([said("assistant", tool_calls={})], Reason.WRONG_TYPE, "messages[0].tool_calls"),
        ([said("assistant", tool_calls=[7])], Reason.BAD_ARGUMENTS, "messages[0].tool_calls[0]"),
        ([said("assistant", tool_calls=[{}])], Reason.MISSING_FIELD, "messages[0].tool_calls[0].name"),
        ([said("assistant", tool_calls=[{"function": 7}])], Reason.WRONG_TYPE, "messages[0].tool_calls[0].function"),
        (
            [said("assistant", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
            Reason.BAD_ARGUMENTS,
            "messages[0].tool_calls[0].function.arguments",
        ),
        (
            [said("assistant", tool_calls=[{"name": "f", "arguments": '{"a": "\\ud800"}'}])],
            Reason.INVALID_ENCODING,
            "messages[0].tool_calls[0].arguments",
        ),
        ([said("assistant", function_call="f")], Reason.BAD_ARGUMENTS, "messages[0].function_call"),
    ],
)
def test_refuses(turns: list[object], reason: Reason, field: str) -> None:
    with pytest.raises(RowError) as caught:
        openai(*turns)
    assert (caught.value.reason, caught.value.field) == (reason, field)


@pytest.mark.parametrize(
    ("turns", "reason", "field"),
    [
        ([("robot", "x")], Reason.UNKNOWN_ROLE, "conversations[0].from"),
        ([("human", "")], Reason.EMPTY_PROMPT, "conversations[0].value"),
        ([("gpt", " ")], Reason.EMPTY_RESPONSE, "conversations[0].value"),
        ([("gpt", "x"), ("human", "x")], Reason.ROLE_ORDER, "conversations[0]"),
        ([("human", "x"), ("gpt", "x"), ("observation", "x")], Reason.ROLE_ORDER, "conversations[2]"),
        ([("function_call", "f(1)")], Reason.BAD_ARGUMENTS, "conversations[0].value"),
        ([("function_call", "[]")], Reason.BAD_ARGUMENTS, "conversations[0].value"),
        ([("function_call", '{"name": 7}')], Reason.WRONG_TYPE, "conversations[0].value.name"),
    ],
)
def test_refuses_sharegpt(turns: list[tuple[str, str]], reason: Reason, field: str) -> None:
    with pytest.raises(RowError) as caught:
        sharegpt(*turns)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_tools() -> None:
    bare = {"name": "add", "parameters": {"type": "object"}}
    whole = {"type": "function", "function": bare}
    for value in ([bare], [whole], json.dumps([bare]), json.dumps([whole])):
        assert read_tools(value) == (whole,)
    assert read_tools(None) == read_tools("") == read_tools([]) == ()


@pytest.mark.parametrize(
    ("value", "field"),
    [
        ("add", "tools"),
        ({}, "tools"),
        ([7], "tools[0]"),
        ([{"name": "f"}, {"function": {}}], "tools[1]"),
        ([{"description": "f"}], "tools[0]"),
    ],
)
def test_refuses_tools(value: object, field: str) -> None:
    with pytest.raises(RowError) as caught:
        read_tools(value)
    assert (caught.value.reason, caught.value.field) == (Reason.INVALID_TOOLS, field)


def test_content_is_not_in_a_message() -> None:
    secret = "0049-40-123456 and more than twenty characters"
    for turn in (said(secret), said("user", [{"type": secret}]), said("assistant", tool_calls=[secret])):
        with pytest.raises(RowError) as caught:
            openai(turn)
        assert secret not in str(caught.value)
