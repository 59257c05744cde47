from __future__ import annotations

from typing import Any

import pytest

from evals import gym
from evals.answer import split
from evals.gym import ReasoningGym, gym_rows
from sft.errors import DataError


class Package:
    """Stands in for reasoning_gym, whose import takes ten seconds; the real one is tried in test_suites.py."""

    def get_score_answer_fn(self, name: str) -> Any:
        if name != "double":
            raise ValueError(name)
        return lambda answer, entry: float(int(answer) == 2 * entry["metadata"]["of"])

    def create_dataset(self, name: str, seed: int, size: int) -> list[dict[str, Any]]:
        assert name == "double"
        broken = {"question": "?", "answer": "0", "metadata": {"of": {1}}}
        unfit = {"question": "?", "answer": "7", "metadata": {"of": 1}}
        right = [
            {"question": f"2 * {n}?", "answer": str(2 * n), "metadata": {"of": n}} for n in range(seed, seed + size - 2)
        ]
        return [broken, unfit, *right]


@pytest.fixture(autouse=True)
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "_gym", Package)
    gym.verifier.cache_clear()


ENTRY = {"question": "2 * 4?", "answer": "8", "metadata": {"of": 4}}
REFERENCE = {"task": "double", "entry": ENTRY}


def test_the_verifier_scores() -> None:
    checker = ReasoningGym(kind="reasoning_gym")
    assert checker.fault(REFERENCE) is None
    values = {text: checker.check(split(text), REFERENCE).value for text in ("8", "9", "eight")}
    assert values == {"8": 1, "9": 0, "eight": 0}


@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("8", "needs a reference with `task` and `entry`"),
        ({"task": "triple", "entry": ENTRY}, "reasoning_gym has no task 'triple'"),
        ({"task": "n_queens", "entry": ENTRY}, "the verifier of task n_queens runs answers as program text"),
        ({"task": "double", "entry": {**ENTRY, "answer": "9"}}, "does not take the row's own answer for right"),
        ({"task": "double", "entry": {"answer": "8"}}, "fails on the row's own answer (KeyError)"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(reference: Any, fault: str) -> None:
    found = ReasoningGym(kind="reasoning_gym").fault(reference)
    assert found is not None
    assert fault in found


def test_rows_are_made_that_can_be_scored() -> None:
    rows = list(gym_rows("double", 4, 7))
    assert [(row["id"], row["prompt"], row["reference"]["entry"]["answer"]) for row in rows] == [
        ("double-2", "2 * 7?", "14"),
        ("double-3", "2 * 8?", "16"),
    ]


def test_without_the_package_the_fault_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise DataError("run `make setup-tasks`")

    monkeypatch.setattr(gym, "_gym", missing)
    assert ReasoningGym(kind="reasoning_gym").fault(REFERENCE) == "run `make setup-tasks`"
