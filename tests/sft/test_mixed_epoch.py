"""An epoch from files to rows in order: census, shares, draw and reading together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest

from sft.holdout import HoldOut
from sft.mixture import Mixture, Mode, passes, plan_epoch, shares
from sft.order import CHUNK_ROWS, FileSize, Reading, read_in_order, reading_order
from tests.sft.prepared import COLUMNS, blocks, census_of

SIZES = [int(size) for size in np.random.default_rng(0).lognormal(5.5, 1.3, 40)]
EPOCH_ROWS = 20_000
HELD = HoldOut(clusters=frozenset(["c3"]))


def task_file(task: int, rows: int) -> pa.Table:
    names = {"source": "gym", "task": f"t{task}", "cluster": f"c{task % 4}", "file": f"{task}.jsonl", "reason": ""}
    made: dict[str, object] = {name: [value] * rows for name, value in names.items()}
    made["id"] = [f"gym/{task}.jsonl:{row}" for row in range(1, rows + 1)]
    return pa.table({**made, "position": range(1, rows + 1)}, COLUMNS)


@pytest.mark.parametrize("mode", ["explicit", "proportional"])
def test_forty_tasks_of_which_the_largest_has_a_hundred_times_the_rows_of_the_smallest(mode: Mode) -> None:
    files = [task_file(task, rows) for task, rows in enumerate(SIZES)]
    census = census_of(*files)
    made = shares(census.counts, Mixture("task", mode, rows=EPOCH_ROWS, weights={"gym": 1}), HELD)
    plan = plan_epoch(census, made, 1, 0)
    times = passes(census, made)
    sizes = [FileSize("gym", rows, times["gym", f"{task}.jsonl"]) for task, rows in enumerate(SIZES)]
    looked_at = 0

    def read(reading: Reading) -> Iterator[pa.Table]:
        nonlocal looked_at
        for table in blocks(files[reading.file], CHUNK_ROWS):
            looked_at += table.num_rows
            yield table.append_column("repeats", pa.array(plan.repeats(table, reading.part, reading.parts)))

    read_tables = read_in_order(reading_order(sizes, 1, 0), read)
    stream = pa.concat_tables(
        table.take(pa.array(np.repeat(np.arange(table.num_rows), table.column("repeats")))) for table in read_tables
    )

    tasks, ids = (np.array(stream.column(name).to_pylist()) for name in ("task", "id"))
    assert Counter(tasks.tolist()) == {share.group.task: share.target for share in made}
    assert len(tasks) == EPOCH_ROWS
    assert looked_at <= EPOCH_ROWS + sum(SIZES)
    assert "c3" not in stream.column("cluster").unique().to_pylist()
    for share in made:
        quarters = np.histogram(np.flatnonzero(tasks == share.group.task), 4, (0, EPOCH_ROWS))[0]
        assert quarters.tolist() == pytest.approx([share.target / 4] * 4, abs=1.5 * CHUNK_ROWS)
    for file, size in enumerate(sizes):
        if not size.passes:
            continue
        copies = np.flatnonzero(ids == f"gym/{file}.jsonl:1")
        assert all(np.diff(copies) > 0.6 * EPOCH_ROWS / size.passes - 2 * CHUNK_ROWS), "copies of a row lie far apart"
