from __future__ import annotations

from pathlib import Path

import pytest

from evals.errors import EvaluationError
from evals.records import Record, appended, read_records, write_record

ONE = Record("s", "m", "a", 0, "f", "text\u2028with\nlines", "why", "stop", 3, 4, 0.5)
FAILED = Record("s", "m", "b", 0, "f", failure="timeout")


def write(path: Path, *records: Record) -> None:
    with appended(path) as file:
        for record in records:
            write_record(file, record)


def test_records_come_back_and_the_last_of_a_key_counts(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    assert read_records(path) == {}
    write(path, ONE, FAILED)
    again = Record("s", "m", "b", 0, "f", "now")
    write(path, again)
    assert read_records(path) == {ONE.key: ONE, again.key: again}


def test_a_line_that_was_cut_off_is_asked_again_and_written_over(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, ONE, FAILED)
    path.write_bytes(path.read_bytes()[:-9])
    assert list(read_records(path)) == [ONE.key]
    write(path, FAILED)
    assert read_records(path) == {ONE.key: ONE, FAILED.key: FAILED}


def test_another_file_is_not_written_into_silently(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"text": "secret"}\n', encoding="utf-8")
    with pytest.raises(EvaluationError, match="line 1 is no answer of an evaluation") as caught:
        read_records(path)
    assert "secret" not in str(caught.value)


def test_one_job_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with appended(path) as file:
        write_record(file, ONE)
        with pytest.raises(EvaluationError, match="another job writes on it now"), appended(path):
            pass
        write_record(file, FAILED)
    write(path, FAILED)
    assert read_records(path) == {ONE.key: ONE, FAILED.key: FAILED}
