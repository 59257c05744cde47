"""The checker that lets reasoning_gym's own verifiers score an answer, and rows for it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

from evals.checker import RIGHT, Checker, Score, wrong
from sft.errors import DataError

RUNS_TEXT = frozenset(
    {
        "binary_matrix",
        "bitwise_arithmetic",
        "codeio",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "number_sorting",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Tasks that (in 0.1.25) hand the answer, or text of the row, to `eval`: neither is ever run here."""


class ReasoningGym(Checker):
    """The verifier of the row's task scores the answer; the reference is {task, entry}, as `gym_rows` makes it."""

    kind: Literal["reasoning_gym"]

    def fault(self, reference: Any) -> str | None:
        if not isinstance(reference, dict) or not {"task", "entry"} <= set(reference):
            return "needs a reference with `task` and `entry`"
        try:
            return fault_of(reference["task"], reference["entry"])
        except DataError as error:
            return str(error)

    def check_text(self, text: str, reference: Any) -> Score:
        try:
            value = float(verifier(reference["task"])(text, reference["entry"]))
        except Exception as error:  # what a verifier raises for text that it cannot read is not documented
            return wrong(f"the verifier cannot read it ({type(error).__name__})")
        return RIGHT if value >= 1 else Score(max(value, 0.0), "the verifier does not take it for right")


def fault_of(task: Any, entry: Any) -> str | None:
    """Why a row cannot be scored; the proof is that its own answer scores 1.

    Raises:
        DataError: reasoning_gym is not installed.
    """
    if task in RUNS_TEXT:
        return f"the verifier of task {task} runs text of answers or rows as a program, which is not done"
    try:
        verify = verifier(task)
    except (ValueError, TypeError):
        return f"reasoning_gym has no task {task!r}"
    try:
        if verify(entry["answer"], entry) == 1:
            return None
    except Exception as error:  # as above
        return f"the verifier of task {task} fails on the row's own answer ({type(error).__name__})"
    return f"the verifier of task {task} does not take the row's own answer for right"


def gym_rows(task: str, rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Makes rows of a suite. Rows that their own verifier cannot score, once written as JSON, are left out.

    Args:
        task: a task of reasoning_gym.
        rows: how many are generated.
        seed: the same seed makes the same rows; take another than for training.

    Raises:
        DataError: reasoning_gym is not installed.
    """
    for number, made in enumerate(_gym().create_dataset(task, seed=seed, size=rows)):
        try:
            entry = json.loads(json.dumps(made))
        except TypeError:
            continue
        if fault_of(task, entry) is None:
            yield {"id": f"{task}-{number}", "prompt": made["question"], "reference": {"task": task, "entry": entry}}


@cache
def verifier(task: str) -> Callable[[str, dict[str, Any]], float]:
    """A task's own verifier.

    Raises:
        ValueError: there is no such task.
        DataError: reasoning_gym is not installed.
    """
    found: Callable[[str, dict[str, Any]], float] = _gym().get_score_answer_fn(task)
    return found


def _gym() -> Any:
    try:
        return importlib.import_module("reasoning_gym")
    except ImportError as error:
        raise DataError(
            f"reasoning_gym tasks need reasoning_gym and what it needs itself ({error}): run `make setup-tasks`, or "
            "`pip install --no-deps -r requirements/tasks.txt`"
        ) from None
