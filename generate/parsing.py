"""What the teacher answered -> tasks, kinds and instances. What cannot be read is None or nothing, never guessed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

from generate.prompts import LEAKS, NONE

ITEM = re.compile(r"^[ \t]*(?:\*\*)?(?:task[ \t]*)?\d{1,3}[ \t]*[.):](?:\*\*)?[ \t]*", re.IGNORECASE | re.MULTILINE)
FIELD = re.compile(r"^[ \t]*(?:\*\*)?(input|output|label)[ \t]*:(?:\*\*)?[ \t]*", re.IGNORECASE | re.MULTILINE)
HEADING = re.compile(r"^[ \t]*(?:\*\*)?example[ \t]*\d*[ \t]*[:.]?(?:\*\*)?[ \t]*$\n?", re.IGNORECASE | re.MULTILINE)
EMPTY = frozenset({"", NONE, "(none)", "n/a", "<none>", "no input", "<noinput>"})
FIRST_WORD = re.compile(r"[a-z]+")


def read_tasks(text: str) -> list[str]:
    """The items of a numbered list, each as one line; what stands before the first is left out."""
    starts = list(ITEM.finditer(text))
    ends = [*(item.start() for item in starts[1:]), len(text)]
    found = (" ".join(text[item.end() : end].split()) for item, end in zip(starts, ends, strict=False))
    return [one for one in found if one]


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Which of two words the answer begins with; None where with neither."""
    found = FIRST_WORD.search(text.casefold())
    return found.group() if found and found.group() in choices else None


def read_instances(text: str, label_first: bool) -> list[tuple[str, str]]:
    """Pairs of input and output, in the order in which they were asked for; a pair that lacks a part is left out.

    Args:
        text: the answer.
        label_first: whether `Label:` and then `Input:` were asked for, rather than `Input:` and `Output:`.
    """
    text = HEADING.sub("", text)
    marks = list(FIELD.finditer(text))
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    fields = [
        ("output" if mark[1].casefold() == "label" else mark[1].casefold(), text[mark.end() : end].strip())
        for mark, end in zip(marks, ends, strict=False)
    ]
    order = ("output", "input") if label_first else ("input", "output")
    pairs = []
    for (first, one), (second, other) in pairwise(fields):
        if (first, second) == order:
            given, output = (other, one) if label_first else (one, other)
            pairs.append(("" if given.casefold().rstrip(".") in EMPTY else given, output))
    if not pairs and not label_first and [name for name, _ in fields] == ["output"]:
        return [("", fields[0][1])]
    return pairs


def leak(text: str) -> str | None:
    """Words of the prompt that an evolved task repeats."""
    folded = text.casefold()
    return next((words for words in LEAKS if words in folded), None)
