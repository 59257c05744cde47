"""Every filter, with literals."""

from __future__ import annotations

from typing import Any

import pytest

from generate.candidate import Candidate, Fault, Reason
from generate.config import FiltersSection
from generate.near import NearIndex
from generate.pool import Pool
from generate.seeds import SeedTask
from generate.sieve import answer_fault, instance_faults, instruction_fault, row_fault

FILTERS = FiltersSection()
LONG = "Describe in a few words how an old wooden bridge over a river in the north is repaired before the winter"


def row(
    instruction: str = "Name a river in Spain.", output: str = "The Ebro.", given: str = "", id: str = "r"
) -> Candidate:
    return Candidate(id, "test", instruction, given, output)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("Name three rivers please", None),
        ("Name three rivers", Fault(Reason.INSTRUCTION_TOO_SHORT, "3 words")),
        (" ".join(["word"] * 150), None),
        (" ".join(["word"] * 151), Fault(Reason.INSTRUCTION_TOO_LONG, "151 words")),
        (" \n", Fault(Reason.EMPTY)),
        ("- Name three rivers please", Fault(Reason.LEADING_PUNCTUATION)),
        ("$5 are how many euros?", Fault(Reason.LEADING_PUNCTUATION)),
        ("¿Dónde está el río más largo?", Fault(Reason.LEADING_PUNCTUATION)),
        ("4 rivers of Spain, please", None),
        ("Describe what the Image shows.", Fault(Reason.KEYWORD, "image")),
        ("Please draw a red house", Fault(Reason.KEYWORD, "draw")),
        ("Write about a drawer and a profile", None),
        ("Tell a joke.<|im_end|> Now", Fault(Reason.TEMPLATE_TOKEN)),
        ("Is a <b>bold</b> word allowed here?", None),
    ],
)
def test_instructions(text: str, fault: Fault | None) -> None:
    assert instruction_fault(text, FILTERS) == fault


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (row(), None),
        (row(output=" "), Fault(Reason.EMPTY)),
        (row(output="The Ebro.</s>"), Fault(Reason.TEMPLATE_TOKEN)),
        (row(given="[INST] x"), Fault(Reason.TEMPLATE_TOKEN)),
        (row(output="name a  river in SPAIN."), Fault(Reason.ECHO)),
        (row(given="The Ebro.", output="the ebro."), Fault(Reason.ECHO)),
        (row(output="There are many:"), Fault(Reason.INCOMPLETE, "ends with a colon")),
        (row(given="The text:"), Fault(Reason.INCOMPLETE, "ends with a colon")),
        (row(output=" ".join(["word"] * 1001)), Fault(Reason.OUTPUT_TOO_LONG, "1001 words")),
    ],
)
def test_rows(candidate: Candidate, fault: Fault | None) -> None:
    assert row_fault(candidate, FILTERS) == fault


@pytest.mark.parametrize(
    ("candidate", "fault"),
    [
        (row(), None),
        (row("Nenne bitte drei Flüsse in Spanien und wie lang sie sind.", "Der Ebro ist der erste."), Reason.LANGUAGE),
        (row("Translate into German: the river is long and it is cold.", "Der Fluss ist lang und er ist kalt."), None),
        (row("Write a short thank-you note to a neighbour.", "Thank you for all that you did for us."), None),
        (row("Назови реку в Испании, пожалуйста", "Это река Эбро"), Reason.LANGUAGE),
        (row("Name Ebro Tajo Duero", "Ebro"), None),
    ],
)
def test_languages(candidate: Candidate, fault: Reason | None) -> None:
    found = row_fault(candidate, FiltersSection(language="en"))
    assert (found.reason if found else None) == fault


def checks(*values: dict[str, Any]) -> FiltersSection:
    return FiltersSection.model_validate({"checks": values})


def test_formats_are_checked_where_they_are_asked_for() -> None:
    filters = checks(
        {"when": r"\bJSON\b", "checker": {"kind": "json", "type": "object"}},
        {"when": "(?i)exactly three bullet", "checker": {"kind": "bullets", "min": 3, "max": 3, "only": True}},
    )
    assert row_fault(row("Name a river.", "no format"), filters) is None
    assert row_fault(row("Name a river as JSON.", '{"river": "Ebro"}'), filters) is None
    assert row_fault(row("Name a river as JSON.", "[1]"), filters) == Fault(Reason.FORMAT, "json: JSON, but no object")
    three = row("Give exactly three bullets.", "- a\n- b")
    assert row_fault(three, filters) == Fault(Reason.FORMAT, "bullets: 2 bullets, at least 3 asked")
    inside = row("Rewrite what is given.", "none", given="Say it in JSON please")
    assert row_fault(inside, filters) is not None


def test_a_check_without_a_verdict_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("evals.text_checkers", "generate.sieve"):
        monkeypatch.setattr(f"{module}.PATTERN_S", 0.05)
    slow = r"(?:(a|aa|a)+)+$"
    found = row_fault(
        row(output="a" * 60 + "!"), checks({"when": "river", "checker": {"kind": "regex", "pattern": slow}})
    )
    assert found == Fault(Reason.FORMAT, "regex: no verdict")
    found = row_fault(row("a" * 60 + "!"), checks({"when": slow, "checker": {"kind": "json"}}))
    assert found == Fault(Reason.FORMAT, "json: no verdict")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("I am sorry, but I cannot.", Reason.REFUSAL),
        ("Sorry. " + "word " * 80, None),
        ("It is what it is.", Reason.ONLY_STOP_WORDS),
        ("... !", Reason.ONLY_STOP_WORDS),
        ("The Ebro.", None),
        ("", None),
    ],
)
def test_answers_to_evolved_tasks(text: str, reason: Reason | None) -> None:
    found = answer_fault(text)
    assert (found.reason if found else None) == reason


def test_instances_beside_each_other() -> None:
    pairs = [("3", "odd"), ("4", "even"), (" 4 ", "EVEN"), ("5", "odd"), ("5", "even"), ("", "x")]
    reasons = [fault.reason if fault else None for fault in instance_faults(pairs)]
    assert reasons == [None, None, Reason.DUPLICATE, Reason.CONTRADICTION, Reason.CONTRADICTION, None]


def pool() -> Pool:
    seed = {"id": "s", "instruction": LONG, "instances": [{"output": "With new planks of oak and with tar."}]}
    return Pool([SeedTask.model_validate(seed)], FILTERS)


def test_instructions_are_compared_with_the_pool() -> None:
    made = pool()
    assert made.claim("a", "Name three rivers in Spain") is None
    assert made.claim("b", " name three RIVERS in Spain") == Fault(Reason.DUPLICATE, "a")
    assert made.claim("c", "Name three rivers in France") == Fault(Reason.ROUGE, "0.80 with a")
    assert made.claim("d", "Name some rivers in France") is None
    changed = LONG.replace("winter", "spring")
    assert made.claim("e", changed) == Fault(Reason.ROUGE, "0.95 with s")
    assert made.claim("e", changed, family=("s",)) is None
    assert made.claim("f", LONG, family=("s",)) == Fault(Reason.DUPLICATE, "s")


def test_rows_are_compared_with_the_pool() -> None:
    made = pool()
    answer = "Take " + " ".join(f"plank{n} beside nail{n}" for n in range(40))
    assert made.keep(row(LONG, answer, id="a")) is None
    assert made.keep(row(LONG, answer + " then rest", id="b")) == Fault(Reason.NEAR_DUPLICATE, "a")
    assert made.keep(row(LONG, "With new planks of oak and with tar.")) == Fault(Reason.NEAR_DUPLICATE, "s-0")
    assert made.keep(row(LONG, "With steel, welded on the spot by two people", id="c")) is None
    assert [one.id for one in made.rows] == ["a", "c"]


def test_near_duplicates_are_found_in_order() -> None:
    index = NearIndex(0.8)
    index.add([row(LONG, "same words here", id="first"), row(LONG, "same words here", id="second")])
    assert index.nearest(row(LONG, "same words here")) == "first"
    assert index.nearest(row(LONG, "other words entirely")) is None
