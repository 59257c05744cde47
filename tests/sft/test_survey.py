from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.base import BaseTokenizer
from sft.errors import DataError
from sft.rows import PREPARED
from sft.survey import EXCLUSIONS, PLACES_HELD, Survey, quarantine_lines, survey
from tests.sft.test_rows import GOOD, prepared, write

Row = Mapping[str, Any]


def row(number: int, reason: str = "", **fields: object) -> dict[str, Any]:
    """One PREPARED row: three tokens, two of them trained, unless there is a reason."""
    return {
        "id": f"s/a.jsonl:{number}:x",
        "source": "s",
        "file": "a.jsonl",
        "position": number,
        "task": "",
        "cluster": "",
        "flags": [],
        "input_ids": [] if reason else [1, 2, 3],
        "labels": [] if reason else [-100, 2, 3],
        "reason": reason,
        "field": "",
        "message": "9 tokens; the limit is 8" if reason else "",
        **fields,
    }


def rows(kept: int, bad: int = 0, reason: str = "too_long") -> list[Row]:
    return [row(i, "" if i < kept else reason) for i in range(kept + bad)]


def table(rows: Sequence[Row]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=PREPARED)


def test_counts() -> None:
    long = row(9, input_ids=list(range(20)), labels=[-100] * 19 + [7], flags=["truncated", "reasoning"])
    counted = survey([table([*rows(3, 1), long, row(5, source="t", flags=["truncated"])])])
    source = {
        "rows": 5,
        "kept": 4,
        "dropped": {"too_long": 1},
        "flags": {"truncated": 1, "reasoning": 1},
        "tokens": 29,
        "trained_tokens": 7,
        "p50": 3,
        "p90": 20,
        "p99": 20,
        "longest": 20,
        "histogram": {"8": 3, "20": 1},
    }
    other = {"p50": 3, "p90": 3, "p99": 3, "longest": 3, "histogram": {"8": 1}}
    counts = {"rows": 1, "kept": 1, "dropped": {}, "flags": {"truncated": 1}, "tokens": 3, "trained_tokens": 2}
    told = counted.to_dict()
    assert told["sources"] == {"s": source, "t": {**counts, **other}}
    assert (told["rows"], told["kept"], told["tokens"], told["histogram"]) == (6, 5, 32, {"8": 4, "20": 1})
    assert told["flags"] == {"truncated": 2, "reasoning": 1}
    assert json.loads(json.dumps(told)) == told


def test_tasks_are_counted_by_cluster() -> None:
    told = survey(
        [
            table([row(0, task="add", cluster="arithmetic"), row(1, task="add", cluster="arithmetic")]),
            table([row(2, "held_out", task="sum", cluster="arithmetic"), row(3, task="rhyme"), row(4)]),
        ]
    ).to_dict()
    assert told["clusters"] == {
        "arithmetic": {"add": {"rows": 2, "kept": 2}, "sum": {"rows": 1, "kept": 0}},
        "": {"rhyme": {"rows": 1, "kept": 1}},
    }


def test_kept_rows_stay_in_order_with_length_and_origin() -> None:
    given = [row(0, file="b"), row(1, "too_long"), row(2, input_ids=[4] * 5, labels=[-100] * 4 + [4]), row(3, file="b")]
    kept = survey([table(given[:3]), table(given[3:])]).kept_rows
    assert kept.lengths.tolist() == [3, 5, 3]
    assert [kept.origins[origin].file for origin in kept.of] == ["b", "a.jsonl", "b"]


def test_the_fingerprint_is_the_sum_of_the_hashes_of_the_ids() -> None:
    given = rows(5, 2)
    hashes = [hashlib.blake2b(one["id"].encode(), digest_size=16).digest() for one in given if not one["reason"]]
    assert survey([table(given)]).fingerprint == f"{sum(map(int.from_bytes, hashes)) % 2**128:032x}"


def test_the_fingerprint_knows_the_rows_and_not_their_order(tmp_path: Path, base: BaseTokenizer) -> None:
    rows = prepared(write(tmp_path / "a.jsonl", [GOOD, {**GOOD, "output": "ho"}]), base)
    back = rows.take([1, 0])
    assert survey([rows]).fingerprint == survey([back.slice(0, 1), back.slice(1)]).fingerprint
    assert survey([rows]).fingerprint != survey([rows.slice(0, 1)]).fingerprint
    assert survey([rows, rows]).fingerprint != survey([]).fingerprint


names = st.sampled_from(["", "a", "b", "häß"])
drawn_rows = st.lists(
    st.builds(
        lambda length, trained, reason, source, file, task, cluster, flags: row(
            0,
            reason,
            source=source,
            file=file,
            task=task,
            cluster=cluster,
            flags=[] if reason else flags,
            input_ids=[] if reason else [5] * length,
            labels=[] if reason else [-100] * (length - trained) + [5] * trained,
        ),
        st.integers(3, 30),
        st.integers(0, 3),
        st.sampled_from(["", "", "", "too_long", "duplicate"]),
        names,
        names,
        names,
        names,
        st.lists(st.sampled_from(["truncated", "contaminated"]), max_size=2),
    ),
    max_size=30,
).map(lambda rows: [{**one, "id": f"{one['source']}/{i}"} for i, one in enumerate(rows)])


@settings(max_examples=60)
@given(rows=drawn_rows, cuts=st.lists(st.integers(0, 30), max_size=4))
def test_blocks_change_nothing(rows: list[Row], cuts: list[int]) -> None:
    edges = sorted({0, len(rows), *(min(cut, len(rows)) for cut in cuts)})
    whole = table(rows)
    blocks = [whole.slice(begin, end - begin) for begin, end in itertools.pairwise(edges)]
    for counted in (survey([whole]), survey(blocks), survey([pa.concat_tables([whole.slice(0, 0), *blocks])])):
        _check_by_hand(counted, rows)


def _check_by_hand(counted: Survey, rows: Sequence[Row]) -> None:
    kept = [one for one in rows if not one["reason"]]
    for source in {one["source"] for one in rows}:
        mine = [one for one in kept if one["source"] == source]
        count = counted.sources[source]
        assert count.rows == sum(one["source"] == source for one in rows)
        assert count.kept == len(mine)
        assert count.dropped == Counter(one["reason"] for one in rows if one["reason"] and one["source"] == source)
        assert count.flags == Counter(flag for one in mine for flag in one["flags"])
        assert count.tokens == sum(len(one["input_ids"]) for one in mine)
        assert count.trained_tokens == sum(label != -100 for one in mine for label in one["labels"])
        assert counted.lengths_by_source()[source].longest == max((len(one["input_ids"]) for one in mine), default=0)
    assert list(counted.sources) == list(dict.fromkeys(one["source"] for one in rows))
    assert {key: count.rows for key, count in counted.tasks.items()} == Counter(
        (one["cluster"], one["task"]) for one in rows
    )
    held = counted.kept_rows
    assert held.lengths.tolist() == [len(one["input_ids"]) for one in kept]
    assert [held.origins[origin] for origin in held.of] == [
        (one["source"], one["task"], one["cluster"], one["file"]) for one in kept
    ]
    assert [one["id"] for one in counted.refused] == [one["id"] for one in rows if one["reason"]]


def test_any_number_of_bad_rows_is_counted_and_few_are_held() -> None:
    written: list[bytes] = []
    tables = [table([row(i, "too_long"), row(i, "duplicate", source="t")]) for i in range(PLACES_HELD + 20)]
    counted = survey(tables, quarantine=written.append)
    assert counted.dropped == {"too_long": PLACES_HELD + 20, "duplicate": PLACES_HELD + 20}
    positions = [one["position"] for one in counted.refused if one["reason"] == "too_long"]
    assert positions == list(range(PLACES_HELD))
    assert len(counted.refused) == 2 * PLACES_HELD
    lines = [json.loads(line) for line in b"".join(written).splitlines()]
    assert len(lines) == 2 * (PLACES_HELD + 20)
    assert lines[:2] == [
        {key: one[key] for key in ("id", "source", "file", "position", "reason", "field", "message")}
        for one in tables[0].to_pylist()
    ]
    assert quarantine_lines(table(rows(3))) == b""
    assert counted.quarantine().count(b"\n") == 2 * PLACES_HELD


@pytest.mark.parametrize(("kept", "bad", "share"), [(95, 5, 0.05), (1, 0, 0.0), (1, 1, 0.5)])
def test_few_bad_rows_are_let_pass(kept: int, bad: int, share: float) -> None:
    survey([table(rows(kept, bad))]).check(share)


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
        survey([table(rows(kept, bad))]).check(share)
    assert f"a.jsonl:{kept} too_long: 9 tokens; the limit is 8" in str(caught.value)


@pytest.mark.parametrize("reason", sorted(EXCLUSIONS))
def test_what_the_config_leaves_out_is_no_fault(reason: str) -> None:
    counted = survey([table(rows(1, 99, reason))])
    counted.check(0.0)
    assert (counted.total.faults, counted.total.excluded) == (Counter(), {reason: 99})
    with pytest.raises(DataError, match=rf"3 of 3 rows cannot be used \(3 {reason}\); nothing is left to train on"):
        survey([table(rows(0, 3, reason))]).check(1.0)


def test_the_message_names_faults_alone() -> None:
    with pytest.raises(DataError, match=r"2 of 7 rows cannot be used \(2 too_long\)") as caught:
        survey([table([*rows(2, 3, "held_out"), *rows(0, 2)])]).check(0.1)
    assert "held_out" not in str(caught.value)


def test_no_rows_at_all_are_refused() -> None:
    with pytest.raises(DataError, match="the data holds no rows"):
        Survey().check(1.0)
