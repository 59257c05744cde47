"""A model's answer and its parts: the rationale, the answer itself, and the final answer where one is marked."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Part = Literal["answer", "final", "whole"]
"""`answer`: what follows the thinking. `final`: what follows the last final-answer mark in it. `whole`: everything."""

MARK = re.compile(
    r"####[ \t]*(?=(?P<hashes>.+))"
    r"|\\boxed\{(?P<boxed>[^{}]*)\}"
    r"|\banswer(?:\*\*)?(?:[ \t]+is\b[ \t]*:?|[ \t]*:)(?:\*\*)?[ \t]*(?=(?P<said>\S.*))",
    re.IGNORECASE,
)
OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a model.

    Rule: `final` is None where no mark names a final answer; `answer` is empty where the thinking never ended.
    """

    whole: str
    rationale: str
    answer: str
    final: str | None

    def part(self, part: Part) -> str | None:
        """The text of a part; None where there is no such part."""
        return {"answer": self.answer, "final": self.final, "whole": self.whole}[part]


def split(text: str, reasoning: str = "") -> Answer:
    """Takes an answer apart.

    Args:
        text: the message's content.
        reasoning: the message's reasoning field, where the server keeps it apart.
    """
    whole = f"{reasoning}\n{text}" if reasoning else text
    thought, closed, after = text.partition(CLOSE)
    if closed:
        rationale, answer = f"{reasoning}\n{thought.replace(OPEN, '', 1)}", after
    elif text.lstrip().startswith(OPEN):
        rationale, answer = f"{reasoning}\n{text.replace(OPEN, '', 1)}", ""
    else:
        rationale, answer = reasoning, text
    marks = list(MARK.finditer(answer))
    final = None
    if marks:
        final = next(found for found in marks[-1].groups() if found is not None).strip().strip("*").rstrip(".").strip()
        rationale = f"{rationale}\n{answer[: marks[-1].start()]}"
    return Answer(whole, rationale.strip(), answer.strip(), final)
