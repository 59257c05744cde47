"""What an endpoint answered, kept as JSON lines, so that a second run asks only what is missing."""

from __future__ import annotations

import dataclasses
import fcntl
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from pydantic import TypeAdapter, ValidationError

from evals.errors import EvaluationError

Key = tuple[str, str, str, int]
"""Suite, model, row id, sample."""


@dataclass(frozen=True, slots=True)
class Record:
    """One request's end: an answer, or the reason why there is none.

    Rule: `failure` is empty exactly where the endpoint answered; `request` is the fingerprint of what was asked.
    Tokens are None where the endpoint does not count them; `seconds` is of the last try.
    """

    suite: str
    model: str
    row: str
    sample: int
    request: str
    text: str = ""
    reasoning: str = ""
    finish_reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    seconds: float = 0.0
    tries: int = 1
    failure: str = ""
    detail: str = ""

    @property
    def key(self) -> Key:
        """What was asked."""
        return self.suite, self.model, self.row, self.sample


RECORD = TypeAdapter(Record)


def read_records(path: Path) -> dict[Key, Record]:
    """The last record of each key; none where there is no file. A last line that was cut off is no record.

    Raises:
        EvaluationError: the file cannot be read, or holds other lines.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: the answers cannot be read ({error}); name another --output") from None
    found: dict[Key, Record] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            record = RECORD.validate_json(line)
        except ValidationError:
            if number == len(lines):
                break
            raise EvaluationError(
                f"{path} line {number} is no answer of an evaluation: name another --output, or delete that line"
            ) from None
        found[record.key] = record
    return found


@contextmanager
def appended(path: Path) -> Iterator[IO[str]]:
    """Opens a file of records to write on, after a last line that was cut off, too; for one process at a time.

    Raises:
        EvaluationError: another process writes on it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as end:
        try:
            fcntl.flock(end, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"{path}: another job writes on it now: wait for its end, or name another --output"
            ) from None
        if end.tell():
            end.seek(-1, 2)
            whole = end.read(1) == b"\n"
            if not whole:
                _drop_last_line(end)
        with path.open("a", encoding="utf-8") as file:
            yield file


def write_record(file: IO[str], record: Record) -> None:
    """Writes a record; it is there also if the job is killed right after."""
    file.write(line(record) + "\n")
    file.flush()


def line(record: Record) -> str:
    """A record as JSON."""
    return json.dumps(dataclasses.asdict(record), ensure_ascii=False)


def answered(records: Iterable[Record]) -> int:
    """How many of them are answers."""
    return sum(not record.failure for record in records)


def _drop_last_line(file: IO[bytes]) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
