"""What a teacher proposes, and what becomes of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a candidate was not kept."""

    TEACHER_FAILED = "teacher_failed"
    UNREADABLE = "unreadable"
    CUT_OFF = "cut_off"
    EMPTY = "empty"
    TEMPLATE_TOKEN = "template_token"
    INSTRUCTION_TOO_SHORT = "instruction_too_short"
    INSTRUCTION_TOO_LONG = "instruction_too_long"
    LEADING_PUNCTUATION = "leading_punctuation"
    KEYWORD = "keyword"
    LANGUAGE = "language"
    DUPLICATE = "duplicate"
    ROUGE = "rouge"
    PROMPT_LEAK = "prompt_leak"
    NO_GAIN = "no_gain"
    ECHO = "echo"
    INCOMPLETE = "incomplete"
    OUTPUT_TOO_LONG = "output_too_long"
    ONLY_STOP_WORDS = "only_stop_words"
    REFUSAL = "refusal"
    CONTRADICTION = "contradiction"
    FORMAT = "format"
    NEAR_DUPLICATE = "near_duplicate"
    SURPLUS = "surplus"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row, or the beginning of one: the output is empty until the teacher gave it.

    Args:
        id: round, request and place in its answer: `3-12-1`.
        source: the way in which it came about: `self_instruct/classification`, `evolve/deepen`, `magpie`.
        parents: ids of the rows that it was evolved from, the first one first.
    """

    id: str
    source: str
    instruction: str
    input: str = ""
    output: str = ""
    parents: tuple[str, ...] = ()

    @property
    def prompt(self) -> str:
        """What the model is asked: as the data path joins instruction and input."""
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate that was not kept. `detail` says more: the keyword, the row that it repeats."""

    candidate: Candidate
    reason: Reason
    detail: str = ""


Outcome = Candidate | Rejected


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a candidate."""

    reason: Reason
    detail: str = ""

    def of(self, candidate: Candidate) -> Rejected:
        """The candidate, rejected for this."""
        return Rejected(candidate, self.reason, self.detail)
