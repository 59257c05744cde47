"""The checker of a row's verifiable instructions, read strictly or loosely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from evals.checker import Checker, Score, right_if
from evals.instructions import AnyInstruction, Instruction

INSTRUCTIONS: TypeAdapter[list[AnyInstruction]] = TypeAdapter(list[AnyInstruction])


def variants(text: str) -> list[str]:
    """A text, and what is left of it without its first line, its last, both, and all of these without asterisks."""
    lines = text.split("\n")
    cut = [text, "\n".join(lines[1:]).strip(), "\n".join(lines[:-1]).strip(), "\n".join(lines[1:-1]).strip()]
    return [*cut, *(one.replace("*", "") for one in cut)]


def read_instructions(reference: Any) -> list[AnyInstruction]:
    """The instructions of a row: its reference's `instructions`, each a `type` with its fields.

    Raises:
        ValueError: there are none, or one is wrong; says which.
    """
    found = reference.get("instructions") if isinstance(reference, dict) else None
    if not isinstance(found, list) or not found:
        raise ValueError("needs a reference with a list `instructions`")
    try:
        return INSTRUCTIONS.validate_python(found)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(str(part) for part in detail["loc"])
        raise ValueError(f"instruction {where}: {detail['msg'].removeprefix('Value error, ')}") from None


class Instructions(Checker):
    """How a row's instructions are followed."""

    kind: Literal["instructions"]
    reading: Literal["strict", "loose"] = Field(
        "strict", description="loose: any variant without first line, last line or asterisks may follow them."
    )
    each: bool = Field(False, description="Score the share that is followed, rather than whether all are.")

    def fault(self, reference: Any) -> str | None:
        try:
            read_instructions(reference)
        except ValueError as error:
            return str(error)
        return None

    def check_text(self, text: str, reference: Any) -> Score:
        asked = read_instructions(reference)
        missed = [one.type for one in asked if not self._follows(one, text)]
        if not self.each:
            return right_if(not missed, _missed(missed))
        share = 1 - len(missed) / len(asked)
        return Score(share, _missed(missed)) if missed else right_if(bool(text.strip()), "is empty")

    def _follows(self, instruction: Instruction, text: str) -> bool:
        read = [text] if self.reading == "strict" else variants(text)
        return any(one.strip() and instruction.follows(one) for one in read)


def _missed(types: Sequence[str]) -> str:
    return f"does not follow {', '.join(types)}"
