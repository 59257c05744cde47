"""The suites that come with raysft: whole, varied, fit to be answered, and apart from what the demo trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from evals.records import Record
from evals.scoring import score
from evals.suite import Suite, fingerprint, read_suites
from evals.words import words

ROOT = Path(__file__).parents[2]
SUPPORT = ROOT / "jobs" / "data" / "support"
SUITES = {suite.name: suite for suite in read_suites([ROOT / "evals" / "suites"])}


def grams(text: str, size: int = 6) -> set[tuple[str, ...]]:
    found = [word.casefold() for word in words(text)]
    return {tuple(found[start : start + size]) for start in range(len(found) - size + 1)}


def value(suite: Suite, number: int, text: str) -> float | None:
    row = suite.rows[number]
    record = Record(suite.name, "m", row.id, 0, fingerprint(suite.request(row, 0, None)), text)
    return score(suite, "m", row, 0, record).score


def test_what_is_shipped() -> None:
    sizes = {name: len(suite.rows) for name, suite in SUITES.items()}
    assert sizes == {
        "format-bullets": 48,
        "format-json": 44,
        "general": 50,
        "procedures": 48,
        "prompt-long": 48,
        "prompt-short": 48,
        "steps-off": 60,
        "steps-on": 60,
    }


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_prompts_differ(suite: Suite) -> None:
    prompts = [row.messages[-1]["content"] for row in suite.rows]
    assert len(set(prompts)) == len(prompts)


def test_the_procedures_begin_with_the_demo_questions_and_are_held_out() -> None:
    rows = SUITES["procedures"].rows
    asked = [(row.messages[-1]["content"], row.reference) for row in rows]
    lines = (SUPPORT / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert asked[: len(lines)] == [(one["question"], one["procedure"]) for one in map(json.loads, lines)]
    trained: set[tuple[str, ...]] = set()
    for name in ("train.jsonl", "conversations.jsonl"):
        for line in (SUPPORT / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            texts = [row.get("instruction", ""), row.get("input", "")]
            texts += [message["content"] for message in row.get("messages", ())]
            trained.update(*map(grams, texts))
    assert [question for question, _ in asked if grams(question) & trained] == []
    known = set(re.findall(r"\b[A-Z]{3}-\d\d\b", (SUPPORT / "README.md").read_text(encoding="utf-8")))
    assert {procedure for _, procedure in asked} == known


def test_the_prompt_pair_asks_the_same_in_one_line_and_in_five_paragraphs() -> None:
    short, long = SUITES["prompt-short"], SUITES["prompt-long"]
    assert short.against == long.name
    assert [(row.id, row.checkers) for row in short.rows] == [(row.id, row.checkers) for row in long.rows]
    assert "\n" not in short.rows[0].messages[0]["content"]
    assert len(long.rows[0].messages[0]["content"].split("\n\n")) == 5


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("format-bullets", "- Tyres\n- Brakes\n- Chain", "Check these:\n- Tyres\n- Brakes\n- Chain"),
        (
            "format-json",
            '{"topic": "delivery", "urgent": false, "reply": "We are looking for it."}',
            '{"topic": "parcels", "urgent": "no", "reply": "We are looking for it."}',
        ),
        (
            "procedures",
            '{"procedure": "RET-03", "action": "Send a prepaid label.", "escalate": false}',
            '{"procedure": "RET-05", "action": "Send a prepaid label.", "escalate": false}',
        ),
        (
            "prompt-short",
            '{"procedure": "RET-05", "action": "Send a prepaid label.", "escalate": false}',
            "RET-03: send a prepaid label.",
        ),
    ],
)
def test_a_good_and_a_bad_answer(name: str, good: str, bad: str) -> None:
    assert (value(SUITES[name], 0, good), value(SUITES[name], 0, bad)) == (1, 0)


GOOD = {
    "capital-france": "The capital of France is Paris.",
    "days-week": "A week has seven days.",
    "water-formula": "H2O",
    "minutes-3h": "Three hours are 3 * 60 = 180 minutes.",
    "one-sentence-rain": "Rain is water that falls from clouds.",
    "poem-moon": "The moon is up,\nthe night is deep,\nthe moon looks down\non those who sleep.",
    "list-fruits": "1. Apple\n2. Pear\n3. Plum\n4. Fig\n5. Kiwi",
    "steps-tea": "1. Boil water.\n2. Add tea.\n3. Wait.",
    "rewrite-polite": "Could you send me the file now, please?",
    "yes-no-fish": "No, it cannot.",
    "yes-no-snow": "Yes.",
    "code-add": "def add(a, b):\n    return a + b",
    "choice-metal": "The answer is B) iron.",
    "capital-letters": "THE SHOP IS OPEN.",
    "reverse-order": "2, 5, 9",
    "explain-wheel": "A wheel rolls, so we move a heavy cart with a little push, and it helps us to go far.",
}


@pytest.mark.parametrize(("row", "text"), GOOD.items())
def test_general_rows_take_a_good_answer(row: str, text: str) -> None:
    suite = SUITES["general"]
    number = [one.id for one in suite.rows].index(row)
    assert value(suite, number, text) == 1


def test_general_rows_notice_a_model_that_answers_everything_as_the_support_desk() -> None:
    suite = SUITES["general"]
    answer = (
        '{"procedure": "RET-03", "action": "Send a label and refund once the parcel is scanned.", "escalate": false}'
    )
    assert [row.id for number, row in enumerate(suite.rows) if value(suite, number, answer) == 1] == []
