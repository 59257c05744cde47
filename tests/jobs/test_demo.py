from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.demo import DemoError, DemoReport, Question, curl, follows_format, names_procedure, read_questions, verdict
from sft.errors import DataError

DATA = Path(__file__).parents[2] / "jobs" / "data" / "support"
GOOD = '{"procedure": "RET-03", "action": "Send a label.", "escalate": false}'


@pytest.mark.parametrize(
    ("answer", "good"),
    [
        (GOOD, True),
        (f" {GOOD}\n", True),
        ("Sure! " + GOOD, False),
        (GOOD[:-1], False),
        ("", False),
        ("[1]", False),
        ('{"procedure": "RET-03", "action": "x"}', False),
        ('{"procedure": "RET-3", "action": "x", "escalate": false}', False),
        ('{"procedure": "RET-03", "action": " ", "escalate": false}', False),
        ('{"procedure": "RET-03", "action": "x", "escalate": "no"}', False),
        ('{"procedure": "RET-03", "action": "x", "escalate": false, "more": 1}', False),
        ('{"action": "x", "procedure": "RET-03", "escalate": false}', False),
    ],
)
def test_format(answer: str, good: bool) -> None:
    assert follows_format(answer) is good


def test_procedure() -> None:
    assert names_procedure(GOOD, "RET-03")
    assert not names_procedure(GOOD, "RET-04")
    assert not names_procedure("RET-03", "RET-03")


def report(base: float, tuned: float) -> DemoReport:
    return DemoReport(
        base_format_rate=base,
        tuned_format_rate=tuned,
        tuned_procedure_rate=0.0,
        questions=10,
        adapter="support@v1",
        train_steps=1,
        train_tokens_per_s=1.0,
        train_trained_tokens_per_s=1.0,
        train_reused=False,
        seconds={},
        answers=[],
    )


def test_verdict() -> None:
    verdict(report(0.1, 0.9))
    for base, tuned in ((0.2, 1.0), (0.0, 0.89)):
        with pytest.raises(DemoError, match="answers in the trained format"):
            verdict(report(base, tuned))


def test_every_shipped_answer_is_in_the_format() -> None:
    answers = [json.loads(line)["output"] for line in (DATA / "train.jsonl").read_text().splitlines()]
    for line in (DATA / "conversations.jsonl").read_text().splitlines():
        answers += [turn["content"] for turn in json.loads(line)["messages"] if turn["role"] == "assistant"]
    assert len(answers) > 200
    assert all(follows_format(answer) for answer in answers)


def test_no_question_is_in_the_training_data() -> None:
    def grams(text: str) -> set[tuple[str, ...]]:
        words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    trained = (DATA / "train.jsonl").read_text() + (DATA / "conversations.jsonl").read_text()
    known = {gram for line in trained.splitlines() for gram in grams(line)}
    questions = read_questions(DATA / "questions.jsonl")
    assert len(questions) >= 10
    assert not [question.question for question in questions if grams(question.question) & known]


def test_questions_are_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "a", "procedure": "RET-03"}\n\n')
    assert read_questions(path) == [Question(question="a", procedure="RET-03")]
    path.write_text('{"question": "a"}\n')
    with pytest.raises(DataError, match="a line is no question"):
        read_questions(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_questions(tmp_path / "none")


def test_the_curl_line_is_one_shell_word_per_argument() -> None:
    assert curl("http://h/v1", "support").startswith("curl -s http://h/v1/chat/completions -H 'content-type")
