"""Seed tasks: what people wrote, from which everything else is generated."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from generate.candidate import Candidate
from sft.errors import ConfigError
from sft.section import Section
from sft.shingles import plain


class Instance(Section):
    """One example of a task."""

    input: str = ""
    output: str = Field(min_length=1)


class SeedTask(Section):
    """A task, as a line of a seed file holds it. Rule: a classification task has an input in every instance."""

    id: str = Field(min_length=1)
    instruction: str = Field(min_length=1)
    classification: bool = Field(False, description="The output is one of a few labels.")
    instances: list[Instance] = Field(min_length=1)

    @model_validator(mode="after")
    def _labels_something(self) -> Self:
        if self.classification and not all(instance.input.strip() for instance in self.instances):
            raise ValueError("a classification task needs an input in each instance")
        return self

    def rows(self) -> list[Candidate]:
        """Its instances as rows."""
        return [
            Candidate(f"{self.id}-{number}", "seed", self.instruction, instance.input, instance.output)
            for number, instance in enumerate(self.instances)
        ]


def read_seeds(path: Path) -> list[SeedTask]:
    """Reads a file of seed tasks, one a line.

    Raises:
        ConfigError: with all faults of the file; they never quote a task.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise ConfigError(str(path), [f"the seed tasks cannot be read: {reason}"]) from None
    faults: list[str] = []
    tasks: list[SeedTask] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                tasks.append(SeedTask.model_validate_json(line))
            except ValidationError as error:
                faults += [f"line {number}: {_said(detail['loc'], detail['msg'])}" for detail in error.errors()]
    for what, counts in (
        ("id", Counter(task.id for task in tasks)),
        ("instruction", Counter(plain(task.instruction) for task in tasks)),
    ):
        twice = sum(count > 1 for count in counts.values())
        if twice:
            faults.append(f"{twice} of the {what}s stand there more than once: each task needs its own")
    if not tasks and not faults:
        faults.append("there are no seed tasks")
    if faults:
        raise ConfigError(str(path), faults)
    return tasks


def _said(place: tuple[int | str, ...], message: str) -> str:
    key = ".".join(map(str, place))
    return f"{key}: {message.removeprefix('Value error, ')}" if key else message.removeprefix("Value error, ")
