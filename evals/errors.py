"""What can go wrong in an evaluation, within the one error tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.errors import RaysftError


class SuiteError(RaysftError):
    """Suites are wrong. Carries every fault, each with its file and row."""

    exit_code = 2

    def __init__(self, faults: Sequence[str]) -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{count} in the suites, nothing was asked", *(f"  - {f}" for f in self.faults)]))

    def __reduce__(self) -> tuple[type[SuiteError], tuple[tuple[str, ...]]]:
        return type(self), (self.faults,)


class EvaluationError(RaysftError):
    """An evaluation cannot go on, or its files cannot be used."""


class GateError(RaysftError):
    """A version did not pass its gate. `data` has what was found, as plain values."""

    def __init__(self, message: str, data: dict[str, Any]) -> None:
        super().__init__(message)
        self.data = data

    def __reduce__(self) -> tuple[type[GateError], tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.data)


class CheckError(RaysftError):
    """A checker came to no verdict. The row is then unscored: it is not the model's fault."""
