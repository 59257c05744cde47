from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import pytest

from evals import gym
from evals.answer import split
from evals.gym import ReasoningGym, gym_rows
from sft.errors import DataError


class Package:
    """Stands in for reasoning_gym; the last tests try the real one, where it is installed."""

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


@pytest.fixture
def _package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gym, "_gym", Package)
    gym.verifier.cache_clear()


ENTRY = {"question": "2 * 4?", "answer": "8", "metadata": {"of": 4}}
REFERENCE = {"task": "double", "entry": ENTRY}


@pytest.mark.usefixtures("_package")
def test_the_verifier_scores() -> None:
    checker = ReasoningGym(kind="reasoning_gym")
    assert checker.fault(REFERENCE) is None
    values = {text: checker.check(split(text), REFERENCE).value for text in ("8", "9", "eight")}
    assert values == {"8": 1, "9": 0, "eight": 0}


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize(
    ("reference", "fault"),
    [
        ("8", "needs a reference with `task` and `entry`"),
        ({"task": "triple", "entry": ENTRY}, "reasoning_gym has no task 'triple'"),
        (
            {"task": "n_queens", "entry": ENTRY},
            "the verifier of task n_queens runs text of answers or rows as a program",
        ),
        ({"task": "double", "entry": {**ENTRY, "answer": "9"}}, "does not take the row's own answer for right"),
        ({"task": "double", "entry": {"answer": "8"}}, "fails on the row's own answer (KeyError)"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(reference: Any, fault: str) -> None:
    found = ReasoningGym(kind="reasoning_gym").fault(reference)
    assert found is not None
    assert fault in found


@pytest.mark.usefixtures("_package")
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
    gym.verifier.cache_clear()
    assert ReasoningGym(kind="reasoning_gym").fault(REFERENCE) == "run `make setup-tasks`"


RUNS = re.compile(r"(?<![\w.])(eval|exec)\(|(?<!def )\bparse_expr\(answer|(sympy|sp)\.(parse_expr|sympify)\(")


def called(function: Any, owner: Any, seen: set[str]) -> str:
    """The source of a function and of all in its module and class that it calls."""
    source = inspect.getsource(function)
    module = inspect.getmodule(function)
    for name in re.findall(r"(\w+)\(", source):
        inner = getattr(owner, name, None) or getattr(module, name, None)
        if inspect.isfunction(inner) and inner.__module__.startswith("reasoning_gym") and name not in seen:
            seen.add(name)
            source += called(inner, owner, seen)
    return source


def test_every_verifier_that_runs_text_is_known() -> None:
    pytest.importorskip("reasoning_gym")
    registered: dict[str, Any] = importlib.import_module("reasoning_gym.factory").DATASETS
    runs = {
        task for task, (dataset, _) in registered.items() if RUNS.search(called(dataset.score_answer, dataset, set()))
    }
    assert runs - gym.RUNS_TEXT == set()
    assert gym.RUNS_TEXT - runs == {"codeio"}  # to make its rows is to run what a model wrote


def test_rows_of_the_real_package_are_scored() -> None:
    pytest.importorskip("reasoning_gym")
    gym.verifier.cache_clear()
    (row,) = gym_rows("gcd", 1, 5)
    checker = ReasoningGym(kind="reasoning_gym")
    right = row["reference"]["entry"]["answer"]
    assert [checker.check(split(text), row["reference"]).value for text in (right, "0")] == [1, 0]
    assert list(gym_rows("propositional_logic", 1, 5)) == []  # its answer is not in the row
