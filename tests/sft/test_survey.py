from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from sft.base import BaseTokenizer
from sft.errors import DataError
from sft.rows import PREPARED
from sft.survey import Survey, survey
from tests.sft.test_rows import GOOD, prepared, write


def table(kept: int, bad: int = 0) -> pa.Table:
    rows = [
        {
            "id": f"s/a.jsonl:{i}:x",
            "source": "s",
            "file": "a.jsonl",
            "position": i,
            "input_ids": [1, 2, 3] if i < kept else [],
            "labels": [-100, 2, 3] if i < kept else [],
            "reason": "" if i < kept else "too_long",
            "field": "",
            "message": "" if i < kept else "9 tokens; the limit is 8",
        }
        for i in range(kept + bad)
    ]
    return pa.Table.from_pylist(rows, schema=PREPARED)


def test_counts() -> None:
    assert survey([table(3, 1)]).to_dict()["sources"] == {
        "s": {"rows": 4, "kept": 3, "dropped": {"too_long": 1}, "tokens": 9, "trained_tokens": 6, "longest": 3}
    }


def test_the_fingerprint_knows_the_rows_and_not_their_order(tmp_path: Path, base: BaseTokenizer) -> None:
    rows = prepared(write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "output": "ho"}]), base)
    back = rows.take([1, 0])
    assert survey([rows]).fingerprint == survey([back.slice(0, 1), back.slice(1)]).fingerprint
    assert survey([rows]).fingerprint != survey([rows.slice(0, 1)]).fingerprint


@pytest.mark.parametrize(("kept", "bad", "share"), [(95, 5, 0.05), (1, 0, 0.0), (1, 1, 0.5)])
def test_few_bad_rows_are_let_pass(kept: int, bad: int, share: float) -> None:
    survey([table(kept, bad)]).check(share)


@pytest.mark.parametrize(
    ("kept", "bad", "share", "message"),
    [
        (94, 6, 0.05, r"6 of 100 rows cannot be used \(6 too_long\); the limit is 5.0%"),
        (0, 4, 1.0, "4 of 4 rows cannot be used .*nothing is left to train on"),
        (1, 1, 0.0, "1 of 2 rows"),
    ],
)
def test_too_many_bad_rows_are_refused_with_reasons_and_places(kept: int, bad: int, share: float, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        survey([table(kept, bad)]).check(share)
    assert f"a.jsonl:{kept} too_long: 9 tokens; the limit is 8" in str(caught.value)


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="the data holds no rows"):
        Survey().check(1.0)
