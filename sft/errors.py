"""The one error tree.

Every error that a user can cause or mend is a `RaysftError`: its text says what was got, what is allowed and what to
do. Jobs print that text and exit with `exit_code`; serving maps the class to an HTTP status. Anything else that
escapes is a fault of raysft itself and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class RaysftError(Exception):
    """Base of all errors that are meant to be read by a user."""

    exit_code = 1


class ConfigError(RaysftError):
    """A configuration is wrong. Carries every fault, not only the first."""

    exit_code = 2

    def __init__(self, origin: str, faults: Sequence[str]) -> None:
        self.origin = origin
        self.faults = tuple(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__("\n".join([f"{origin}: {count} in the configuration", *(f"  - {f}" for f in self.faults)]))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[str, tuple[str, ...]]]:
        return type(self), (self.origin, self.faults)


class DataError(RaysftError):
    """A data set cannot be read, or too many of its rows are unusable."""


class TemplateError(RaysftError):
    """A chat template cannot be rendered, or cannot be masked exactly."""


class ModelError(RaysftError):
    """A base model or its tokenizer cannot be loaded or used as asked."""


class TrainingError(RaysftError):
    """A training run failed."""


class CheckpointError(RaysftError):
    """A checkpoint is incomplete, damaged or belongs to another run."""


class AdapterError(RaysftError):
    """An adapter bundle is incomplete, damaged or unfit for the base model."""


class StorageError(RaysftError):
    """A storage address cannot be used."""
