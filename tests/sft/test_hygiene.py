from __future__ import annotations

import pickle

import pytest

from sft.data_config import HygieneSection
from sft.duplicates import Duplicates, fingerprints
from sft.hygiene import Found, HygieneRules, Screened, plan_hygiene, screen
from sft.messages import Conversation, Reason, RowError
from tests.sft.rows_of_text import conversation

TEST_ROW = conversation("What is the capital of France?", "Paris")


def rules(**fields: object) -> HygieneRules:
    section = HygieneSection.model_validate({"evaluation": ["test.jsonl"], **fields})
    return plan_hygiene(section, [("test.jsonl", [TEST_ROW])])


def rows() -> list[Conversation]:
    return [
        conversation("Say hi", "hi"),
        TEST_ROW,
        conversation("Who?", "a@b.co"),
        conversation("What is the capital of France?", "Ask a@b.co"),
    ]


def test_without_anything_to_look_for_rows_pass_as_they_are() -> None:
    plan = plan_hygiene(HygieneSection(), [("unread", iter([TEST_ROW]))])
    assert plan.evaluation is None
    assert not plan.compares
    passed = screen(rows(), plan)
    assert passed == [Screened(row, ()) for row in rows()]


def test_flags_name_file_and_kind() -> None:
    noted = screen(rows(), rules(contamination="flag", personal_data="redact"))
    assert noted == [
        Screened(rows()[0], ()),
        Screened(rows()[1], ("contaminated:test.jsonl",)),
        Screened(conversation("Who?", "[EMAIL]"), ("personal_data:email",)),
        Screened(
            conversation("What is the capital of France?", "Ask [EMAIL]"),
            ("contaminated:test.jsonl", "personal_data:email"),
        ),
    ]


def test_dropped_rows_say_why() -> None:
    fates = screen(rows(), rules(contamination="drop", personal_data="drop"))
    lost = [(fate.reason, fate.field, fate.message) if isinstance(fate, RowError) else None for fate in fates]
    shared = (Reason.CONTAMINATED, "", "the row shares text with the evaluation file test.jsonl")
    assert lost == [
        None,
        shared,
        (Reason.PERSONAL_DATA, "messages[1]", "the turn holds an e-mail address"),
        shared,
    ]


def test_rules_travel_to_workers() -> None:
    plan = pickle.loads(pickle.dumps(rules(contamination="drop")))
    assert [isinstance(fate, RowError) for fate in screen(rows(), plan)] == [False, True, False, True]


@pytest.mark.parametrize(
    ("actions", "dropped", "flags"),
    [
        ({"duplicates": "drop", "contradictions": "flag"}, [3], {0: ("contradiction",), 1: ("contradiction",)}),
        ({"duplicates": "flag", "contradictions": "drop"}, [0, 1, 3], {}),
        ({"duplicates": "drop"}, [3], {}),
        ({"duplicates": "flag"}, [], {3: ("duplicate",)}),
        ({"near_duplicates": "drop"}, [], {}),
    ],
)
def test_actions_decide_what_becomes_of_findings(
    actions: dict[str, str], dropped: list[int], flags: dict[int, tuple[str, ...]]
) -> None:
    plan = rules(**actions)
    assert plan.compares
    texts = [("q", "a"), ("q", "b"), ("p", "c"), ("q", "a")]
    ids = [f"s/f:{i}" for i in range(len(texts))]
    index = Duplicates(plan.near_threshold)
    near = plan.near_threshold is not None
    index.add(fingerprints(ids, [conversation(*row) for row in texts], [False] * len(texts), near))
    findings = index.findings()

    assert [finding.row for finding in findings if plan.dropped(finding.reasons)] == dropped
    kept = {finding.row: plan.flags(finding.reasons) for finding in findings if not plan.dropped(finding.reasons)}
    assert {row: noted for row, noted in kept.items() if noted} == flags
    found = Found.of(findings).look_up(ids)
    assert [i for i, reasons in enumerate(found) if plan.dropped(reasons)] == dropped
    assert Found.of(findings).look_up([]) == []


def test_the_reason_is_the_first_that_drops() -> None:
    plan = rules(duplicates="flag", contradictions="drop")
    index = Duplicates()
    texts = [("q", "a"), ("q", "b"), ("q", "a")]
    index.add(fingerprints(["0", "1", "2"], [conversation(*row) for row in texts], [False] * 3, near=False))
    last = list(index.findings())[-1]
    assert last.reasons == (Reason.DUPLICATE, Reason.CONTRADICTION)
    assert plan.dropped(last.reasons) == Reason.CONTRADICTION
    assert plan.flags(last.reasons) == ("duplicate",)
