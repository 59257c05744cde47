from __future__ import annotations

import pytest

from generate.parsing import leak, read_choice, read_instances, read_tasks


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        ("9. One task.\n10. Another\n    task.\n\n11) A third", ["One task.", "Another task.", "A third"]),
        ("Sure, here you are:\n\nTask 9: One\n**Task 10:** Two", ["One", "Two"]),
        ("**9.** One\n10.\n11: Two", ["One", "Two"]),
        ("In 1999. No list", []),
        ("", []),
    ],
)
def test_lists(text: str, tasks: list[str]) -> None:
    assert read_tasks(text) == tasks


@pytest.mark.parametrize(
    ("text", "choice"), [("Yes.", "yes"), (" **no**, because", "no"), ("None", None), ("Maybe yes", None), ("", None)]
)
def test_choices(text: str, choice: str | None) -> None:
    assert read_choice(text, ("yes", "no")) == choice


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("Input: 3\nOutput: odd\n\nInput: 4\nOutput: even", [("3", "odd"), ("4", "even")]),
        (
            "Example 1\nInput:\na\nb\nOutput:\nc\n\nd\n**Example 2:**\nInput: x\nOutput: y",
            [("a\nb", "c\n\nd"), ("x", "y")],
        ),
        ("**Input:** none\n**Output:** A poem.", [("", "A poem.")]),
        ("Output: A poem.", [("", "A poem.")]),
        ("Input: N/A\nOutput: x\nInput: cut", [("", "x")]),
        ("Output: a\nOutput: b", []),
        ("Here is a poem.", []),
    ],
)
def test_inputs_first(text: str, pairs: list[tuple[str, str]]) -> None:
    assert read_instances(text, label_first=False) == pairs


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("Label: odd\nInput: 3\nLabel: even\nInput: 4", [("3", "odd"), ("4", "even")]),
        ("Output: odd\nInput: 3", [("3", "odd")]),
        ("Input: 3\nLabel: odd", []),
        ("Label: odd", []),
    ],
)
def test_labels_first(text: str, pairs: list[tuple[str, str]]) -> None:
    assert read_instances(text, label_first=True) == pairs


def test_words_of_the_prompt() -> None:
    assert leak("The new task: write a poem") == "new task"
    assert leak("Write a task list for a move.") is None
