from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.formats import FormatName, RowSpec, detect, known_fields, to_conversation
from sft.messages import Conversation, Message, Reason, Role, RowError

USER = Message("user", "Hi")
ANSWER = Message("assistant", "Hello", trained=True)
SYSTEM = Message("system", "Be brief.")
PLAIN = Conversation((USER, ANSWER))
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("name", "row", "conversation"),
    [
        ("alpaca", {"instruction": "Hi", "output": "Hello"}, PLAIN),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello"}, PLAIN),
        ("alpaca", {"instruction": "Hi", "input": " \n", "output": "Hello"}, PLAIN),
        ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello", "messages": None}, PLAIN),
        (
            "alpaca",
            {"instruction": "Hi", "input": "there", "output": "Hello"},
            Conversation((Message("user", "Hi\n\nthere"), ANSWER)),
        ),
        (
            "alpaca",
            {"system": "Be brief.", "instruction": "Hi", "output": "Hello", "task": "greet", "cluster": "talk"},
            Conversation((SYSTEM, USER, ANSWER), (), "greet", "talk"),
        ),
        (
            "dolly",
            {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
            Conversation((USER, ANSWER), (), "open_qa"),
        ),
        (
            "dolly",
            {"instruction": "Hi", "context": "there", "response": "Hello", "category": "x", "task": "y"},
            Conversation((Message("user", "Hi\n\nthere"), ANSWER), (), "y"),
        ),
        (
            "dolly",
            {"instruction": "Hi", "input": "there", "response": "Hello"},
            Conversation((Message("user", "Hi\n\nthere"), ANSWER)),
        ),
        (
            "flan",
            {
                "inputs": "Hi",
                "targets": "Hello",
                "task_source": "Flan2021",
                "task_name": "rte:1.0.0",
                "template_type": "zs_opt",
            },
            Conversation((USER, ANSWER), (), "rte:1.0.0"),
        ),
        (
            "sni",
            {
                "task": "task001_x",
                "Definition": ["Greet."],
                "Categories": ["Dialogue", "Other"],
                "id": "task001-1",
                "input": "Hi",
                "output": ["Hello", "Hey"],
            },
            Conversation((Message("user", "Greet.\n\nHi"), ANSWER), (), "task001_x", "Dialogue"),
        ),
        (
            "sni",
            {"Definition": "Greet.", "Categories": [], "input": "", "output": "Hello"},
            Conversation((Message("user", "Greet."), ANSWER)),
        ),
        (
            "sni",
            {"task_name": "task001_x", "id": "1", "definition": "Greet.", "inputs": "Hi", "targets": "Hello"},
            Conversation((Message("user", "Greet.\n\nHi"), ANSWER), (), "task001_x"),
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, PLAIN),
        ("sharegpt", {"conversations": TURNS}, PLAIN),
        (
            "sharegpt",
            {
                "system": "Be brief.",
                "tools": '[{"name": "add", "parameters": {"type": "object"}}]',
                "conversations": [{"from": "user", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"}],
            },
            Conversation((SYSTEM, USER, ANSWER), (TOOL,)),
        ),
        ("openai", {"messages": TURNS}, PLAIN),
        ("openai", {"messages": json.dumps(TURNS), "tools": None, "task": ""}, PLAIN),
        ("openai", {"messages": [{"role": "system", "content": "Be brief."}, *TURNS, *TURNS], "tools": [TOOL]},
         Conversation((SYSTEM, USER, ANSWER, USER, ANSWER), (TOOL,))),
        ("prompt_completion", {"prompt": "Hi", "completion": "Hello"}, PLAIN),
        (
            "prompt_completion",
            {
                "prompt": [{"role": "system", "content": "Be brief."}, *TURNS, TURNS[0]],
                "completion": [TURNS[1], *TURNS],
            },
            Conversation((SYSTEM, USER, Message("assistant", "Hello"), USER, ANSWER, USER, ANSWER)),
        ),
        ("prompt_completion", {"prompt": [TURNS[0]], "completion": "Hello"}, PLAIN),
        ("prompt_completion", {"prompt": "Hi", "completion": [TURNS[1]]}, PLAIN),
    ],
)  # fmt: skip
def test_converts_by_name_and_by_its_fields(name: FormatName, row: dict[str, Any], conversation: Conversation) -> None:
    assert to_conversation(row, RowSpec(name)) == conversation
    assert to_conversation(row) == conversation


def test_the_rows_in_the_guide_are_of_their_format() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `(\w+)` \| (`\{.*`) \|$", guide, re.MULTILINE)
    assert {name for name, _ in shown} == set(get_args(FormatName)) - {"auto"}
    for name, examples in shown:
        for row in map(json.loads, re.findall(r"`(.*?)`", examples)):
            assert detect(row) == name
            assert to_conversation(row).messages[-1].trained


def test_every_format_takes_reasoning_apart() -> None:
    text = "<think>\nA greeting.\n</think>\n\nHello"
    rows: list[dict[str, Any]] = [
        {"instruction": "Hi", "output": text},
        {"instruction": "Hi", "response": text},
        {"inputs": "Hi", "targets": text},
        {"Definition": "Hi", "input": "", "output": [text]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]},
        {"messages": [TURNS[0], {"role": "assistant", "content": text}]},
        {"prompt": "Hi", "completion": text},
    ]
    thought = Message("assistant", "Hello", trained=True, reasoning="A greeting.")
    assert [to_conversation(row) for row in rows] == [Conversation((USER, thought))] * len(rows)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"question": "Hi", "reply": "Hello"}, {"prompt": "question", "completion": "reply"}),
        ({"qa": {"q": "Hi", "a": {"text": ["Hello"]}}}, {"instruction": "qa.q", "output": "qa.a.text.0"}),
        ({"qa.q": "Hi", "response": "Hello"}, {"instruction": "qa.q", "output": "response"}),
        ({"input": "Hi", "instruction": "Hello"}, {"instruction": "input", "output": "instruction"}),
        ({"instruction": "Hi", "response": "Hello"}, {"output": "response", "input": "context"}),
        ({"instruction": "Hi", "input": "not this", "output": "Hello"}, {"input": "context"}),
        ({"chosen": TURNS, "messages": None}, {"messages": "chosen"}),
    ],
)
def test_columns_are_mapped(row: dict[str, Any], columns: dict[str, str]) -> None:
    assert to_conversation(row, RowSpec(columns=tuple(columns.items()))) == PLAIN


def test_a_mapped_column_is_named_in_the_error() -> None:
    spec = RowSpec("alpaca", (("output", "meta.answer"),))
    with pytest.raises(RowError, match=r"missing_field in output: .*\(column meta.answer\)"):
        to_conversation({"instruction": "Hi", "meta": {"answer": None}}, spec)
    with pytest.raises(RowError, match=r"missing_field in instruction: the field is missing or null$"):
        to_conversation({"meta": {"answer": "x"}}, spec)


def test_a_mapped_column_that_would_not_be_read_is_refused() -> None:
    row = {"instruction": "Hi", "context": "there", "response": "Hello"}
    with pytest.raises(RowError, match=r"unknown_format in targets: .* format dolly has no such"):
        to_conversation(row, RowSpec(columns=(("targets", "context"),)))


def test_a_system_text_may_stand_twice() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *TURNS]
    assert to_conversation({"system": "Be brief.", "messages": turns}).messages == (SYSTEM, USER, ANSWER)


def test_task_and_cluster_can_be_mapped() -> None:
    row = {"inputs": "Hi", "targets": "Hello", "task_name": "rte", "task_source": "NIv2"}
    made = to_conversation(row, RowSpec(columns=(("cluster", "task_source"),)))
    assert (made.task, made.cluster) == ("rte", "NIv2")


@pytest.mark.parametrize(
    ("roles", "trained"),
    [(("assistant",), (False, False, True)), (("user", "assistant"), (False, True, True)), (("user",), (False, True))],
)
def test_trained_roles(roles: tuple[Role, ...], trained: tuple[bool, ...]) -> None:
    for row in (
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
        {"system": "Be brief.", "instruction": "Hi", "output": "Hello"},
    ):
        assert tuple(turn.trained for turn in to_conversation(row, RowSpec(roles=roles)).messages) == trained


@pytest.mark.parametrize(
    ("row", "reason", "field"),
    [
        ([1, 2], Reason.NOT_AN_OBJECT, ""),
        ("text", Reason.NOT_AN_OBJECT, ""),
        (None, Reason.NOT_AN_OBJECT, ""),
        ({}, Reason.UNKNOWN_FORMAT, ""),
        ({"prompt": "x"}, Reason.UNKNOWN_FORMAT, ""),
        ({"Instances": []}, Reason.UNKNOWN_FORMAT, ""),
        ({"instruction": 7, "output": "x"}, Reason.WRONG_TYPE, "instruction"),
        ({"instruction": "x", "output": None}, Reason.MISSING_FIELD, "output"),
        ({"instruction": "x", "output": " \n"}, Reason.EMPTY_RESPONSE, "output"),
        ({"instruction": "x", "output": "\ud800"}, Reason.INVALID_ENCODING, "output"),
        ({"instruction": " ", "output": "x"}, Reason.EMPTY_PROMPT, "instruction"),
        ({"instruction": "", "input": "x", "output": "x"}, Reason.EMPTY_PROMPT, "instruction"),
        ({"instruction": "x", "input": 3, "output": "x"}, Reason.WRONG_TYPE, "input"),
        ({"instruction": "x", "input": "x", "context": "x", "output": "x"}, Reason.WRONG_TYPE, "context"),
        ({"instruction": "x", "output": "x", "history": [["x", "x"]]}, Reason.UNSUPPORTED_CONTENT, "history"),
        ({"instruction": "x", "output": "x", "task": ["x"]}, Reason.WRONG_TYPE, "task"),
        ({"instruction": "x", "output": "x", "system": 3}, Reason.WRONG_TYPE, "system"),
        ({"instruction": "x", "output": "x", "task": {}}, Reason.WRONG_TYPE, "task"),
        ({"instruction": "x", "output": "x", "tools": {}}, Reason.INVALID_TOOLS, "tools"),
        ({"instruction": "x", "response": "<think>x"}, Reason.UNCLOSED_REASONING, "response"),
        ({"inputs": "x", "targets": ["x"]}, Reason.WRONG_TYPE, "targets"),
        ({"Definition": [], "input": "", "output": "x"}, Reason.EMPTY_PROMPT, "Definition"),
        ({"Definition": "x", "input": "x", "output": []}, Reason.EMPTY_RESPONSE, "output"),
        ({"Definition": "x", "output": "x"}, Reason.MISSING_FIELD, "input"),
        ({"messages": None}, Reason.MISSING_FIELD, "messages"),
        ({"conversations": {"from": "x"}}, Reason.WRONG_TYPE, "conversations"),
        ({"prompt": [], "completion": "x"}, Reason.ROLE_ORDER, "prompt and completion[0]"),
        ({"prompt": "x", "completion": []}, Reason.NO_RESPONSE, "prompt and completion"),
        ({"prompt": "x", "completion": [7]}, Reason.WRONG_TYPE, "completion[0]"),
        ({"system": "x", "messages": [{"role": "system", "content": "y"}, *TURNS]}, Reason.ROLE_ORDER, "system"),
    ],
)
def test_refuses(row: object, reason: Reason, field: str) -> None:
    with pytest.raises(RowError) as caught:
        to_conversation(row)
    assert (caught.value.reason, caught.value.field) == (reason, field)


def test_a_named_format_is_not_guessed() -> None:
    with pytest.raises(RowError, match="messages: the field is missing"):
        to_conversation({"instruction": "x", "output": "y"}, RowSpec("openai"))


def test_an_untrained_role_leaves_nothing() -> None:
    with pytest.raises(RowError) as caught:
        to_conversation({"instruction": "x", "output": "y"}, RowSpec(roles=("tool",)))
    assert caught.value.reason is Reason.NOTHING_TRAINED


def test_known_fields() -> None:
    assert known_fields("dolly") == {
        "instruction", "context", "response", "category", "system", "tools", "task", "cluster"
    }  # fmt: skip
    assert known_fields("auto") > known_fields("openai") > {"messages"}


# Any JSON value, with field names, roles and marks that lead deep into the converters.
turn_fields = ["role", "content", "from", "value", "train", "weight", "tool_calls", "tool_call_id", "reasoning"]
call_fields = ["function", "name", "arguments", "id", "type", "text"]
names = st.sampled_from(["\ud800", *sorted(known_fields("auto")), *turn_fields, *call_fields])
speakers = st.sampled_from(["user", "assistant", "system", "tool", "human", "gpt", "function_call", "observation"])
texts = st.sampled_from(["x", "", " ", "ä", "\ud800", "<think>x</think>y", "<think>", "{}", "[]", '{"name": "f"}'])
words = speakers | texts
leaves = st.none() | st.booleans() | st.integers() | st.floats() | words | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | st.text(max_size=3), inner, max_size=5),
    max_leaves=25,
)
turns = st.fixed_dictionaries(
    {},
    optional={"role": words, "content": values, "from": words, "value": values, "tool_calls": values, "train": leaves},
)
rows = st.dictionaries(names, values | words | st.lists(turns, max_size=4), max_size=6)


@given(values | rows, st.sampled_from(get_args(FormatName)))
def test_any_value_is_a_conversation_or_refused_with_a_reason(row: object, name: FormatName) -> None:
    try:
        made = to_conversation(row, RowSpec(name, (("task", "type"), ("cluster", "input.0"))))
    except RowError as error:
        str(error).encode()
        return
    assert made.messages[-1].trained
    json.dumps([turn.to_dict() for turn in made.messages] + list(made.tools), ensure_ascii=False).encode()
