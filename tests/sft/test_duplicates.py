from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.duplicates import Duplicates, Finding, Findings, fingerprints, row_key
from sft.messages import Conversation, Message, Reason, ToolCall
from tests.sft.rows_of_text import conversation, edited, jaccard, several_turns, vocabulary

DUPLICATE, NEAR, CONTRADICTION = Reason.DUPLICATE, Reason.NEAR_DUPLICATE, Reason.CONTRADICTION


def find(
    rows: Sequence[Conversation], threshold: float | None = None, held_out: Sequence[int] = (), cut: int = 1000
) -> Findings:
    """Feeds rows in blocks of `cut`."""
    index = Duplicates(threshold)
    for start in range(0, len(rows), cut):
        block = range(start, min(start + cut, len(rows)))
        ids = [f"s/f:{i}" for i in block]
        held = [i in held_out for i in block]
        index.add(fingerprints(ids, [rows[i] for i in block], held, threshold is not None))
    assert len(index) == len(rows)
    return index.findings()


def found(rows: Sequence[Conversation], held_out: Sequence[int] = ()) -> list[Finding]:
    return list(find(rows, held_out=held_out))


def test_the_first_of_equal_rows_is_kept() -> None:
    rows = [
        conversation("Where is the Café?", "In  the\tsquare"),
        conversation("Say hi", "hi"),
        conversation(" where is the cafe\u0301?\n", "in the square"),
        conversation("say HI", "\uff28\uff29"),
        conversation("Say hi", "hi"),
    ]
    assert found(rows) == [Finding(2, 0, (DUPLICATE,)), Finding(3, 1, (DUPLICATE,)), Finding(4, 1, (DUPLICATE,))]


@pytest.mark.parametrize(
    "other",
    [
        conversation("Say hi!", "hi"),
        several_turns("Say hi", "hi", system="Be brief"),
        several_turns("Say", "hi", "hi", "hi"),
        Conversation(conversation("Say hi", "hi").messages, tools=({"function": {"name": "f"}},)),
        conversation("Say hi hi", ""),
        conversation("Say", "hi hi"),
    ],
)
def test_rows_with_another_prompt_are_others(other: Conversation) -> None:
    assert found([conversation("Say hi", "hi"), other]) == []


def test_one_prompt_with_several_answers_is_a_contradiction_of_all_its_rows() -> None:
    rows = [
        conversation("Capital of France?", "Paris"),
        conversation("Say hi", "hi"),
        conversation("capital of france?", "PARIS."),
        conversation("Capital of  France?", "Lyon"),
        conversation("Capital of France?", "Paris"),
    ]
    assert found(rows) == [
        Finding(0, 3, (CONTRADICTION,)),
        Finding(2, 3, (CONTRADICTION,)),
        Finding(3, 0, (CONTRADICTION,)),
        Finding(4, 0, (DUPLICATE, CONTRADICTION)),
    ]


def test_another_reasoning_is_neither_duplicate_nor_contradiction() -> None:
    rows = [conversation("2+2?", "4", reasoning=thought) for thought in ("two and two", "count", None)]
    assert found(rows) == []
    assert found([*rows, rows[1]]) == [Finding(3, 1, (DUPLICATE,))]
    assert found([rows[0], conversation("2+2?", "5", reasoning="two and two")]) == [
        Finding(0, 1, (CONTRADICTION,)),
        Finding(1, 0, (CONTRADICTION,)),
    ]


def test_the_prompt_of_several_turns_is_all_before_the_last() -> None:
    rows = [several_turns("a", "b", "c", "d"), several_turns("a", "x", "c", "e"), several_turns("a", "b", "c", "f")]
    assert [(finding.row, finding.first) for finding in found(rows)] == [(0, 2), (2, 0)]


def test_tool_calls_are_an_answer_whatever_their_ids() -> None:
    def calls(place: str, call_id: str) -> Conversation:
        call = ToolCall("weather", {"unit": "C", "place": place}, id=call_id)
        return Conversation((Message("user", "Rain?"), Message("assistant", "", trained=True, tool_calls=(call,))))

    assert found([calls("Bonn", "1"), calls("bonn", "2")]) == [Finding(1, 0, (DUPLICATE,))]
    assert [finding.reasons for finding in found([calls("Bonn", "1"), calls("Ulm", "1")])] == [(CONTRADICTION,)] * 2


def test_what_repeats_a_row_that_is_held_out_is_found_wherever_it_is() -> None:
    rows = [conversation("Say hi", "hi"), conversation("Who?", "me"), conversation("say hi", "HI")]
    assert found(rows, held_out=[2]) == [Finding(0, 2, (DUPLICATE,))]
    assert found(rows, held_out=[0, 2]) == []


def test_findings_carry_the_keys_of_their_rows() -> None:
    findings = find([conversation("Say hi", "hi")] * 3)
    assert len(findings) == 2
    assert findings.keys.tolist() == [row_key("s/f:1"), row_key("s/f:2")]
    assert row_key("s/f:1") == 4919526379501362022


def test_nothing_is_found_among_no_rows() -> None:
    assert len(find([])) == 0
    assert len(find([], 0.8)) == 0


def test_rows_may_be_added_after_a_comparison() -> None:
    index = Duplicates()
    block = fingerprints(["a"], [conversation("Say hi", "hi")], [False], near=False)
    index.add(block)
    assert len(index.findings()) == 0
    index.add(block)
    assert list(index.findings()) == [Finding(1, 0, (DUPLICATE,))]


def test_a_record_has_its_documented_size() -> None:
    row = conversation("Say hi", "hi")
    assert [len(fingerprints(["a"], [row], [False], near)[0]) for near in (False, True)] == [49, 305]


PROMPT = "Tell me at length how the old bridge over the river in our town was built and by whom it was paid for"
ANSWER = "It was built in three summers by masons from the valley, and the town paid for the stones with a toll"


def test_near_rows_need_a_near_answer() -> None:
    rows = [
        conversation(PROMPT, ANSWER),
        conversation(f"Please {PROMPT}", ANSWER),
        conversation(PROMPT, "Nobody knows"),
        conversation(PROMPT, f"{ANSWER} then"),
    ]
    findings = [(finding.row, finding.first, finding.reasons) for finding in find(rows, 0.7)]
    assert findings == [
        (0, 2, (CONTRADICTION,)),
        (1, 0, (NEAR,)),
        (2, 0, (CONTRADICTION,)),
        (3, 0, (NEAR, CONTRADICTION)),
    ]


def test_a_shared_system_turn_makes_no_rows_near() -> None:
    system = f"{PROMPT} {ANSWER}"
    rows = [several_turns(f"What is {i} times 7?", "It depends", system=system) for i in range(5)]
    assert find(rows, 0.5).rows.tolist() == []


def test_near_duplicates_around_the_threshold() -> None:
    """Of 1200 pairs, those clearly over the threshold are found, and those clearly under it are not."""
    rng = random.Random(0)
    known = vocabulary(rng)
    rows, similar = [], []
    for _ in range(1200):
        words = rng.choices(known, k=100)
        other = edited(rng, words, known, rng.choice([1, 2, 3, 4, 6]))
        similar.append(min(jaccard(words, other), jaccard(words[50:], other[50:])))
        rows += [conversation(" ".join(text[:50]), " ".join(text[50:])) for text in (words, other)]
    near = {finding.row: finding.first for finding in find(rows, 0.7) if NEAR in finding.reasons}
    assert all(first == row - 1 for row, first in near.items())
    hits = [2 * i + 1 in near for i in range(len(similar))]

    def share(low: float, high: float) -> float:
        chosen = [hit for hit, value in zip(hits, similar, strict=True) if low <= value < high]
        assert len(chosen) > 50
        return sum(chosen) / len(chosen)

    assert share(0.78, 1.01) == 1
    assert share(0.0, 0.6) == 0
    assert share(0.7, 0.78) > 0.8
    assert share(0.6, 0.7) < 0.2


small = st.sampled_from(["a", "b", "A ", "c", "b."])
few = st.lists(st.builds(conversation, small, small), max_size=14)


def literally(rows: Sequence[Conversation], held_out: frozenset[int]) -> list[tuple[int, tuple[Reason, ...]]]:
    """The definitions, row by row."""
    texts = [tuple(turn.content.strip().lower() for turn in row.messages) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (i not in held_out, i))
    findings = []
    for i in range(len(rows)):
        earlier = order[: order.index(i)]
        reasons = [DUPLICATE] if texts[i] in [texts[j] for j in earlier] else []
        if any(texts[i][0] == prompt and texts[i][1].rstrip(".") != answer.rstrip(".") for prompt, answer in texts):
            reasons.append(CONTRADICTION)
        if reasons and i not in held_out:
            findings.append((i, tuple(reasons)))
    return findings


@given(few, st.frozensets(st.integers(0, 13)))
def test_exact_findings_are_what_the_definitions_say(rows: list[Conversation], held_out: frozenset[int]) -> None:
    findings = find(rows, held_out=sorted(held_out))
    assert [(finding.row, finding.reasons) for finding in findings] == literally(rows, held_out)


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 50))
def test_findings_do_not_depend_on_the_blocks(seed: int, cut: int) -> None:
    rng = random.Random(seed)
    known = vocabulary(rng, 100)
    texts = [rng.choices(known, k=30) for _ in range(8)]
    rows = []
    for _ in range(40):
        words = edited(rng, rng.choice(texts), known, rng.randint(0, 2))
        rows.append(conversation(" ".join(words[:10]), " ".join(words[10:])))
    whole, parts = find(rows, 0.6, held_out=[5, 30]), find(rows, 0.6, held_out=[5, 30], cut=cut)
    assert len(whole) > 0
    assert list(whole) == list(parts)
    assert whole.keys.tolist() == parts.keys.tolist()
