"""A suite: prompts, what is checked of their answers, and how they are asked; read from plain files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from evals.checkers import AnyChecker
from evals.errors import SuiteError
from sft.config import read_config
from sft.errors import ConfigError
from sft.section import Section

NAME = r"^[a-z0-9][a-z0-9_-]*$"
WAYS = ("all", "mean")
Name = Annotated[str, Field(pattern=NAME)]
Checkers = dict[Name, AnyChecker]


class Generation(Section):
    """How answers are generated."""

    max_tokens: int = Field(512, gt=0, description="Longest answer, in tokens.")
    temperature: float = Field(0.0, ge=0, description="0 always takes the likeliest token.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; null leaves it to the endpoint.")
    seed: int | None = Field(None, description="Seed of sampling; sample k is asked with seed + k.")
    stop: list[str] = Field([], description="Texts that end an answer.")
    samples: int = Field(1, gt=0, description="Answers to each prompt; a row's score is their mean.")

    @model_validator(mode="after")
    def _samples_differ(self) -> Self:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples above 1 need a temperature above 0: they would all be the same answer")
        return self


class Message(Section):
    """One message of a prompt."""

    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str


class RowFile(Section):
    """A row as it is written: `prompt`, or `messages` that end with the user's."""

    id: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)] = Field(
        min_length=1
    )
    prompt: str | None = Field(None, min_length=1)
    messages: list[Message] | None = Field(None, min_length=1)
    reference: Any = None
    checkers: Checkers = Field({})

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError("the last of messages must be the user's")
        return self


class SuiteFile(Section):
    """A suite's YAML file."""

    name: Name
    description: str = Field(min_length=1)
    score: Name = Field(
        "all", description="A row's score: the least of its checkers' (all), their mean, or that of the checker named."
    )
    system: str | None = Field(None, description="System prompt of rows that have none of their own.")
    against: Name | None = Field(
        None, description="Suite with the same row ids: tuned models here are also compared with the baseline there."
    )
    checkers: Checkers = Field({})
    generation: Generation = Generation()
    rows: str | list[dict[str, Any]] = Field(description="The rows, or the name of a JSONL file beside this one.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        taken = [name for name in self.checkers if name in WAYS]
        if taken:
            raise ValueError(f"no checker can be named {taken[0]}: score uses that word")
        return self


@dataclass(frozen=True)
class Row:
    """A prompt and what is checked of its answer. Rule: there is at least one checker, and each can be used."""

    id: str
    messages: tuple[Mapping[str, str], ...]
    reference: Any
    checkers: Mapping[str, AnyChecker]


@dataclass(frozen=True)
class Suite:
    """Prompts that are asked and scored alike. Rule: row ids differ, and there is at least one row."""

    name: str
    description: str
    score: str
    against: str | None
    generation: Generation
    rows: tuple[Row, ...]

    def first(self, rows: int | None) -> Suite:
        """The suite with its first rows only; None keeps all."""
        return self if rows is None else replace(self, rows=self.rows[:rows])

    def request(self, row: Row, sample: int, thinking: bool | None) -> dict[str, Any]:
        """The body of a chat completion request, but for the model."""
        settings = self.generation
        body: dict[str, Any] = {
            "messages": [dict(message) for message in row.messages],
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
        }
        if settings.top_p is not None:
            body["top_p"] = settings.top_p
        if settings.seed is not None:
            body["seed"] = settings.seed + sample
        if settings.stop:
            body["stop"] = list(settings.stop)
        if thinking is not None:
            body["chat_template_kwargs"] = {"enable_thinking": thinking}
        return body


def fingerprint(body: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that say whether an answer on file is one to this request."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]


def read_suites(paths: Iterable[Path]) -> list[Suite]:
    """Reads suite files, and all `*.yaml` of folders.

    Raises:
        SuiteError: with every fault of all files, each with its file and row.
    """
    faults: list[str] = []
    suites: list[tuple[Path, Suite]] = []
    for path in _files(paths, faults):
        suite = _read(path, faults)
        if suite:
            suites.append((path, suite))
    by_name = {suite.name: suite for _, suite in suites}
    for name, count in Counter(suite.name for _, suite in suites).items():
        if count > 1:
            faults.append(f"{count} suites are named {name}: give each a name of its own")
    for path, suite in suites:
        other = by_name.get(suite.against) if suite.against else None
        if other and {row.id for row in other.rows} != {row.id for row in suite.rows}:
            faults.append(f"{path}: its rows have other ids than those of {other.name}, which it is compared against")
    if not suites and not faults:
        faults.append("there is no suite: name files or folders with --suite")
    if faults:
        raise SuiteError(faults)
    return [suite for _, suite in suites]


def _files(paths: Iterable[Path], faults: list[str]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            found = sorted(path.glob("*.yaml"))
            if not found:
                faults.append(f"{path}: the folder holds no *.yaml file")
            yield from found
        else:
            yield path


def _read(path: Path, faults: list[str]) -> Suite | None:
    before = len(faults)
    try:
        file = read_config(SuiteFile, path)
    except ConfigError as error:
        faults += [f"{path}: {fault}" for fault in error.faults]
        return None
    if isinstance(file.rows, str):
        origin = path.parent / file.rows
        given = _lines(origin, faults)
    else:
        origin, given = path, [(f"row {number}", value) for number, value in enumerate(file.rows, 1)]
    rows = [row for where, value in given for row in _row(file, f"{origin} {where}", value, faults)]
    for name, count in Counter(row.id for row in rows).items():
        if count > 1:
            faults.append(f"{origin}: {count} rows have the id {name}")
    if not given and len(faults) == before:
        faults.append(f"{origin}: there are no rows")
    if len(faults) > before:
        return None
    return Suite(file.name, file.description, file.score, file.against, file.generation, tuple(rows))


def _lines(path: Path, faults: list[str]) -> list[tuple[str, Any]]:
    """The values of a JSONL file, each with its place."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        faults.append(f"{path}: the rows cannot be read: {reason}")
        return []
    found: list[tuple[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append((f"line {number}", json.loads(line)))
            except ValueError as error:
                faults.append(f"{path} line {number}: no JSON ({getattr(error, 'msg', 'damaged')})")
    return found


def _row(file: SuiteFile, where: str, value: Any, faults: list[str]) -> Sequence[Row]:
    """The row, or nothing but faults."""
    try:
        row = RowFile.model_validate(value)
    except ValidationError as error:
        faults += [f"{where}: {fault}" for fault in _faults(error)]
        return ()
    checkers = {**file.checkers, **row.checkers}
    mine = []
    if not checkers:
        mine.append("nothing is checked: give the suite or the row checkers")
    elif file.score not in (*WAYS, *checkers):
        mine.append(f"has no checker {file.score}, which is the suite's score: it has {', '.join(checkers)}")
    refusals = {name: checker.fault(row.reference) for name, checker in checkers.items()}
    mine += [f"checker {name} {fault}" for name, fault in refusals.items() if fault]
    faults += [f"{where} ({row.id}): {fault}" for fault in mine]
    if mine:
        return ()
    messages = [message.model_dump() for message in row.messages or ()]
    if row.prompt is not None:
        messages = [{"role": "user", "content": row.prompt}]
    if file.system is not None and messages[0]["role"] not in ("system", "developer"):
        messages.insert(0, {"role": "system", "content": file.system})
    return (Row(row.id, tuple(messages), row.reference, checkers),)


def _faults(error: ValidationError) -> Iterator[str]:
    """What is wrong with a row, without what it holds."""
    for detail in error.errors(include_input=False):
        key = ".".join(str(part) for part in detail["loc"])
        message = {"missing": "is missing", "extra_forbidden": "no such field"}.get(
            detail["type"], detail["msg"].removeprefix("Value error, ")
        )
        yield f"{key}: {message}" if key else message
