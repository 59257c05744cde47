from __future__ import annotations

from typing import Any, get_args

import pytest

from evals.answer import split
from evals.following import INSTRUCTIONS, Instructions, variants
from evals.instructions import AnyInstruction

CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"type": "keywords:existence", "keywords": ["bike", "rain"]}, ["Rain, bike."], ["bikes in rain", ""]),
    (
        {"type": "keywords:frequency", "keyword": "bike", "frequency": 2, "relation": "at least"},
        ["Bike and bike"],
        ["bike", "bikebike"],
    ),
    (
        {"type": "keywords:frequency", "keyword": "bike", "frequency": 2, "relation": "less than"},
        ["bike", ""],
        ["bike bike"],
    ),
    ({"type": "keywords:forbidden_words", "forbidden_words": ["no", "not"]}, ["knot"], ["No!"]),
    (
        {"type": "keywords:letter_frequency", "letter": "A", "let_frequency": 3, "let_relation": "at least"},
        ["banana", "Aaa"],
        ["band"],
    ),
    (
        {"type": "language:response_language", "language": "de"},
        ["Das ist nicht der Weg."],
        ["That is not the way.", ""],
    ),
    (
        {"type": "length_constraints:number_sentences", "num_sentences": 3, "relation": "less than"},
        ["One. Two."],
        ["One. Two. Three."],
    ),
    (
        {"type": "length_constraints:number_paragraphs", "num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a", "a\n***\n***\nb", "a***b***c"],
    ),
    (
        {"type": "length_constraints:number_words", "num_words": 3, "relation": "at least"},
        ["one two three"],
        ["one, two"],
    ),
    (
        {
            "type": "length_constraints:nth_paragraph_first_word",
            "num_paragraphs": 2,
            "nth_paragraph": 2,
            "first_word": "then",
        },
        ["First.\n\n\u201cThen, on."],
        ["First. Then", "First.\n\nLater", "a\n\nthen\n\nb"],
    ),
    (
        {"type": "detectable_content:number_placeholders", "num_placeholders": 2},
        ["[name] of [town]"],
        ["[name]", "[] []"],
    ),
    (
        {"type": "detectable_content:postscript", "postscript_marker": "P.S."},
        ["Hi.\nP. S. Bye", "p.s. x"],
        ["Hi P.S. x"],
    ),
    (
        {"type": "detectable_format:number_bullet_lists", "num_bullets": 2},
        ["* a\n- b"],
        ["* a", "* a\n* b\n* c", "**a**"],
    ),
    ({"type": "detectable_format:constrained_response"}, ["My answer is no."], ["No.", "my answer is no"]),
    (
        {"type": "detectable_format:number_highlighted_sections", "num_highlights": 2},
        ["*a* and **b c**"],
        ["*a*", "* a\n* b"],
    ),
    (
        {"type": "detectable_format:multiple_sections", "section_spliter": "Section", "num_sections": 2},
        ["Section 1\na\nSection 2\nb"],
        ["Section 1\na", "Section\nSection"],
    ),
    ({"type": "detectable_format:json_format"}, ['{"a": 1}', "```json\n[]\n```"], ["a: 1", ""]),
    ({"type": "detectable_format:title"}, ["<<My day>>\nIt was."], ["<My day>", "<< >>"]),
    ({"type": "combination:two_responses"}, ["Yes ****** No"], ["Yes ****** Yes", "Yes", "a ****** b ****** c"]),
    (
        {"type": "combination:repeat_prompt", "prompt_to_repeat": "Name a bike."},
        ["Name a bike. The Skarn."],
        ["The Skarn."],
    ),
    (
        {"type": "startend:end_checker", "end_phrase": "Any questions?"},
        ["Hi. any questions?\n"],
        ["Any questions? No."],
    ),
    ({"type": "startend:quotation"}, ['"Hi."'], ['"Hi', '"']),
    (
        {"type": "change_case:capital_word_frequency", "capital_frequency": 2, "capital_relation": "at least"},
        ["GO NOW please"],
        ["GO now"],
    ),
    ({"type": "change_case:english_capital"}, ["THE BIKE IS HERE, AND IT IS RED."], ["The bike", "123"]),
    ({"type": "change_case:english_lowercase"}, ["the bike is here."], ["The bike", "das ist nicht der weg."]),
    ({"type": "punctuation:no_comma"}, ["One and two."], ["One, two."]),
]


@pytest.mark.parametrize(("instruction", "follow", "fail"), CASES, ids=[case[0]["type"] for case in CASES])
def test_instructions(instruction: dict[str, Any], follow: list[str], fail: list[str]) -> None:
    (read,) = INSTRUCTIONS.validate_python([instruction])
    assert [text for text in follow if not read.follows(text)] == []
    assert [text for text in fail if read.follows(text)] == []


def test_all_published_types_are_there() -> None:
    types = {get_args(one.model_fields["type"].annotation)[0] for one in get_args(get_args(AnyInstruction)[0])}
    assert len(types) == 25
    assert types == {case[0]["type"] for case in CASES}


def check(text: str, **settings: Any) -> float:
    instructions = [
        {"type": "punctuation:no_comma"},
        {"type": "startend:end_checker", "end_phrase": "Done."},
    ]
    checker = Instructions(kind="instructions", **settings)
    return checker.check(split(text), {"instructions": instructions}).value


def test_strict_and_loose() -> None:
    chatty = "Sure, here you are:\nAll is well.\n**Done.**"
    assert check(chatty) == 0
    assert check(chatty, reading="loose") == 1
    assert check("All is well. Done.") == 1
    assert check("Well, no.", reading="loose") == 0
    assert check("Well, no. Done.", each=True) == 0.5
    assert check("", each=True) == check("", reading="loose") == 0


def test_eight_variants() -> None:
    assert variants("*a*\nb\nc") == ["*a*\nb\nc", "b\nc", "*a*\nb", "b", "a\nb\nc", "b\nc", "a\nb", "b"]


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        (None, "needs a reference with a list `instructions`"),
        ({"instructions": []}, "needs a reference with a list `instructions`"),
        ({"instructions": [{"type": "punctuation:no_full_stop"}]}, "instruction 0: Input tag"),
        (
            {"instructions": [{"type": "startend:end_checker"}]},
            "instruction 0.startend:end_checker.end_phrase: Field required",
        ),
        (
            {"instructions": [{"type": "language:response_language", "language": "tlh"}]},
            "instruction 0.language:response_language.language: is not known",
        ),
    ],
)
def test_wrong_instructions_are_refused(reference: Any, fault: str) -> None:
    found = Instructions(kind="instructions").fault(reference)
    assert found is not None
    assert found.startswith(fault)
