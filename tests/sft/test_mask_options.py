"""What a config may ask of a mask: roles, reasoning, split history, tools; and templates with an odd end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sft.base import BaseTokenizer
from sft.formats import RowSpec
from sft.mask import UNTRAINED
from sft.rows import Rules
from tests.templates import FAMILIES, Family, family
from tests.templates.oracle import ANY_FORMAT, WHOLE, Row, Talk, check, prepare_rows, prepare_talks, served_ids
from tests.templates.talks import PLAIN, TWO, talk
from tests.templates.tokenizers import Kind, make_base, text_of
from tests.tiny import CHATML, small_base

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of today",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
SPLIT = replace(WHOLE, history="split")
ANSWER_ONLY = replace(WHOLE, reasoning=False)


def trained(base: BaseTokenizer, row: Row, kind: Kind = "gpt2") -> list[str]:
    """What the trained turns of a row read."""
    assert row.reason == ""
    return [text_of(base, kind, row.ids[start:end]) for start, end in row.runs]


def thinking(*turns: tuple[str, str, str]) -> Talk:
    """Exchanges of question, reasoning and answer."""
    return [
        {"role": role, "content": text} | ({"reasoning_content": thought} if role == "assistant" else {})
        for question, thought, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]


# Special tokens


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.name)
def test_an_answer_may_hold_no_special_token_as_text(family: Family) -> None:
    base = make_base(family, "gpt2")
    marks = list(dict.fromkeys([*family.special, *family.stop]))
    rows = prepare_talks(base, [talk("Hi", f"a {mark} b") for mark in marks])
    assert {mark: row.reason for mark, row in zip(marks, rows, strict=True)} == dict.fromkeys(
        marks, "special_token_in_response"
    )


# Templates that end a conversation, or a turn, with more than one stop token


def test_a_turn_ends_with_its_first_stop_token() -> None:
    base = small_base(CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}")
    rows = prepare_talks(base, [talk("Hi", "Hello"), TWO])
    assert trained(base, rows[0]) == ["Hello<|im_end|>"]
    assert trained(base, rows[1]) == ["Blue.<|im_end|>", "Green, as in grass.<|im_end|>"]


@pytest.mark.parametrize("kind", ["gpt2", "gpt4", "prepend", "metaspace"])
@pytest.mark.parametrize("name", ["granite-3", "phi-3"])
def test_a_mark_that_is_bos_or_takes_white_space_with_it_is_no_obstacle(name: str, kind: Kind) -> None:
    base = make_base(family(name), kind)
    base.template.prove()
    for one, row in zip(PLAIN, prepare_talks(base, PLAIN), strict=True):
        assert row.reason == ""
        check(family(name), kind, base, one, row)


# Truncation


def test_a_truncated_row_is_flagged() -> None:
    base = make_base(family("smollm2"), "gpt2")
    (whole,) = prepare_talks(base, [TWO])
    length = len(whole.ids)
    cut, fits = (prepare_talks(base, [TWO], Rules(limit, truncate=True))[0] for limit in (length - 3, length))
    assert (cut.flags, fits.flags) == (["truncated"], [])


# Which turns are trained


def test_users_turns_are_trained_where_asked() -> None:
    base = make_base(family("smollm2"), "gpt2")
    (row,) = prepare_rows(base, [{"messages": TWO}], spec=RowSpec(roles=("user", "assistant")))
    assert trained(base, row) == [
        "Name a colour.<|im_end|>",
        "Blue.<|im_end|>",
        "And another?<|im_end|>",
        "Green, as in grass.<|im_end|>",
    ]


def test_a_row_says_itself_which_turns_are_trained() -> None:
    base = make_base(family("smollm2"), "gpt2")
    flagged = [turn | ({"train": i == 3} if turn["role"] == "assistant" else {}) for i, turn in enumerate(TWO)]
    first, both = prepare_talks(base, [flagged, TWO])
    assert trained(base, first) == ["Green, as in grass.<|im_end|>"]
    assert first.ids == both.ids


def test_a_weight_on_the_prompt_moves_no_trained_label() -> None:
    base = make_base(family("smollm2"), "gpt2")
    (plain,), (weighted,) = (prepare_talks(base, [TWO], rules) for rules in (WHOLE, replace(WHOLE, prompt_weight=0.1)))
    assert weighted.ids == plain.ids
    assert weighted.labels == [UNTRAINED, *plain.ids[1:]]  # which of them is the prompt's, the weights say


# Reasoning


def test_reasoning_is_trained_and_read_alike_from_field_and_marks() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    marked = talk("Is 7 prime?", "<think>\nNo divisor.\n</think>\n\nYes.")
    rows = prepare_talks(base, [thinking(("Is 7 prime?", "No divisor.", "Yes.")), marked])
    for row in rows:
        assert trained(base, row) == ["<think>\nNo divisor.\n</think>\n\nYes.<|im_end|>"]
    assert rows[0].ids == rows[1].ids


def test_reasoning_is_read_and_not_trained_where_asked() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    talks = [thinking(("Is 7 prime?", "No divisor.", "Yes.")), talk("Is 7 prime?", "Yes.")]
    rows, whole = prepare_talks(base, talks, ANSWER_ONLY), prepare_talks(base, talks)
    assert [row.ids for row in rows] == [row.ids for row in whole]
    for row in rows:
        (text,) = trained(base, row)
        assert text.lstrip("\n") == "Yes.<|im_end|>"


def test_a_template_without_reasoning_is_the_same_with_and_without_it() -> None:
    base = make_base(family("smollm2"), "gpt2")
    assert prepare_talks(base, PLAIN, ANSWER_ONLY) == prepare_talks(base, PLAIN)


# History that a template rewrites


def test_rewritten_history_is_split_into_turns_as_served() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    one = thinking(("Is 7 prime?", "No divisor.", "Yes."), ("And 9?", "3 x 3.", "No."), ("1?", "By convention.", "No."))
    rows = prepare_talks(base, [one], SPLIT)
    assert [trained(base, row) for row in rows] == [
        ["<think>\nNo divisor.\n</think>\n\nYes.<|im_end|>"],
        ["<think>\n3 x 3.\n</think>\n\nNo.<|im_end|>"],
        ["<think>\nBy convention.\n</think>\n\nNo.<|im_end|>"],
    ]
    for turn, row in zip((1, 3, 5), rows, strict=True):
        ((start, _),) = row.runs
        assert row.ids[:start] == served_ids(base, one[:turn])
        assert served_ids(base, one[: turn + 1], prompt=False)[: len(row.ids)] == row.ids
    whole_id = prepare_talks(base, [one])[0].id
    assert [row.id for row in rows] == [f"{whole_id}#{turn}" for turn in (1, 3, 5)]


def test_split_history_leaves_other_rows_whole_and_in_order() -> None:
    thinker, plain = make_base(family("qwen-3"), "gpt2"), make_base(family("qwen-2.5"), "gpt2")
    assert prepare_talks(plain, PLAIN, SPLIT) == prepare_talks(plain, PLAIN)
    single = talk("Hi", "Hello")
    rows = prepare_talks(thinker, [single, TWO, single], SPLIT)
    places = [(row.id.split(":")[1], row.id.partition("#")[2]) for row in rows]
    assert [place for place, _ in places] == ["1", "2", "2", "3"]
    assert [turn for _, turn in places][1:3] == ["1", "3"]


def test_each_split_turn_has_its_own_fate() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    (short, _) = prepare_talks(base, [TWO], SPLIT)
    rows = prepare_talks(base, [TWO], replace(SPLIT, max_length=len(short.ids)))
    assert [row.reason for row in rows] == ["", "too_long"]


def test_a_turn_that_is_not_trained_makes_no_split_example() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    flagged = [turn | ({"train": i == 3} if turn["role"] == "assistant" else {}) for i, turn in enumerate(TWO)]
    (row,) = prepare_talks(base, [flagged], SPLIT)
    assert trained(base, row) == ["<think>\n\n</think>\n\nGreen, as in grass.<|im_end|>"]


# Tools


def with_tools(arguments: Any, **thought: str) -> Talk:
    """A call of a tool, its result and an answer."""
    call = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Is it dry in Rome?"},
        {"role": "assistant", "content": "", "tool_calls": [call], **thought},
        {"role": "tool", "content": "dry", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Yes.", **thought},
    ]


@pytest.mark.parametrize(
    ("name", "call", "answer"),
    [
        (
            "qwen-2.5",
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>',
            "Yes.<|im_end|>",
        ),
        ("llama-3.1", '{"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>', "Yes.<|eot_id|>"),
        (
            "mistral-v3",
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}, "id": "call00001"}]</s>',
            " Yes.</s>",
        ),
    ],
    ids=["qwen-2.5", "llama-3.1", "mistral-v3"],
)
def test_tool_calls_are_trained_and_their_results_are_not(name: str, call: str, answer: str) -> None:
    base = make_base(family(name), "gpt2")
    rows = [{"messages": with_tools(arguments), "tools": TOOLS} for arguments in ('{"city": "Rome"}', {"city": "Rome"})]
    oracle = with_tools({"city": "Rome"})
    for row in prepare_rows(base, rows):
        assert trained(base, row) == [call, answer]
        for (start, _), turn in zip(row.runs, (1, 3), strict=True):
            assert row.ids[:start] == served_ids(base, oracle[:turn], tools=TOOLS)


def test_a_thinking_model_calls_tools_with_its_reasoning_kept() -> None:
    base = make_base(family("qwen-3"), "gpt2")
    row = {"messages": with_tools({"city": "Rome"}, reasoning_content="Hm."), "tools": TOOLS}
    opening = "<think>\nHm.\n</think>\n\n"
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    (whole,) = prepare_rows(base, [row])
    assert trained(base, whole) == [opening + call, opening + "Yes.<|im_end|>"]
    (answers,) = prepare_rows(base, [row], ANSWER_ONLY)
    assert [text.lstrip("\n") for text in trained(base, answers)] == [call, "Yes.<|im_end|>"]
    assert answers.ids == whole.ids


def test_tools_that_are_offered_and_not_called_are_in_the_prompt() -> None:
    base = make_base(family("qwen-2.5"), "gpt2")
    offered, bare = prepare_rows(base, [{"messages": TWO, "tools": TOOLS}, {"messages": TWO}], spec=ANY_FORMAT)
    assert trained(base, offered) == trained(base, bare)
    assert offered.ids[: offered.runs[0][0]] == served_ids(base, TWO[:1], tools=TOOLS)


# Rows that break a renderer or a tokenizer


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_half_a_surrogate_pair_is_that_rows_fault_alone(role: str) -> None:
    base = make_base(family("smollm2"), "gpt2")
    broken = talk("half \ud83d", "Hello") if role == "user" else talk("Hi", "half \ud83d")
    rows = prepare_talks(base, [broken, TWO])
    assert rows[0].reason != ""
    assert rows[1:] == prepare_talks(base, [talk("Hi", "Hello"), TWO])[1:]


@pytest.mark.parametrize(
    "fault", ["messages[0].content + 1", "1 // (messages | length - 2)", "'a'.index(messages[0].content)"]
)
def test_whatever_a_template_raises_is_that_rows_fault_alone(fault: str) -> None:
    base = small_base("{% if 'fault' in messages[0].content %}{{ " + fault + " }}{% endif %}" + CHATML)
    rows = prepare_talks(base, [talk("fault", "Hello"), TWO])
    assert [row.reason for row in rows] == ["template_error", ""]
