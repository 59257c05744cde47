"""What every checker is: a config section that gives an answer a score, and says why."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from evals.answer import Answer, Part
from sft.section import Section


@dataclass(frozen=True, slots=True)
class Score:
    """A score in [0, 1]; `reason` says why it is not 1, and is empty where it is."""

    value: float
    reason: str = ""


RIGHT = Score(1.0)


def wrong(reason: str) -> Score:
    """A score of 0."""
    return Score(0.0, reason)


def right_if(holds: bool, reason: str) -> Score:
    """1 where something holds, else 0 with the reason."""
    return RIGHT if holds else wrong(reason)


class Checker(Section):
    """Base of all checkers; each adds a `kind` and its own settings."""

    of: Part = Field("answer", description="Which part of an answer is checked.")

    def fault(self, reference: Any) -> str | None:  # noqa: ARG002  (checkers that compare use it)
        """Why this checker cannot be used on a row with that reference; None where it can."""
        return None

    def check(self, answer: Answer, reference: Any) -> Score:
        """Scores an answer.

        Raises:
            CheckError: there is no verdict, for a reason that is not the model's.
        """
        text = answer.part(self.of)
        if text is None:
            return wrong("no final answer is marked")
        return self.check_text(text, reference)

    @abstractmethod
    def check_text(self, text: str, reference: Any) -> Score:
        """Scores the part that `of` names."""


class Comparing(Checker):
    """Base of checkers that compare with a reference: their own, else the row's."""

    reference: Any = Field(None, description="What is right; by default the row's reference.")

    def fault(self, reference: Any) -> str | None:
        """Why the reference cannot be compared with; several are a list, of which any is right."""
        wanted = self._wanted(reference)
        if not wanted:
            return "needs a reference: give the row (or the checker) one"
        return next(filter(None, map(self.fault_of, wanted)), None)

    def check_text(self, text: str, reference: Any) -> Score:
        """The best score over all references."""
        scores = [self.compare(text, wanted) for wanted in self._wanted(reference)]
        return max(scores, key=lambda score: score.value)

    def fault_of(self, wanted: Any) -> str | None:
        """Why one reference cannot be compared with."""
        return None if isinstance(wanted, str) and wanted.strip() else "needs a text to compare with"

    @abstractmethod
    def compare(self, text: str, wanted: Any) -> Score:
        """Compares with one reference."""

    def _wanted(self, reference: Any) -> Sequence[Any]:
        found = self.reference if self.reference is not None else reference
        return found if isinstance(found, list) else [] if found is None else [found]
