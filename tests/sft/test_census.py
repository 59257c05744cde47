from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft import census
from sft.census import Cell, FileCount, cells
from sft.rowkey import hash_ids
from tests.sft.prepared import blocks, census_of, prepared

A, B, C = Cell("s", "sum", "maths"), Cell("s", "sort", "words"), Cell("t", "", "")


def test_rows_are_counted_by_cell_and_file() -> None:
    counted = census_of(prepared([A, B, A, C, B], refused=[2, 3]))
    assert counted.counts == {A: 1, B: 2, C: 0}
    assert counted.files == {
        ("s", "rows.jsonl"): FileCount(5, {A: 1, B: 2}),  # type: ignore[arg-type]
        ("t", "rows.jsonl"): FileCount(4, {C: 0}),  # type: ignore[arg-type]
    }


@pytest.mark.parametrize("sorted_rows", [1, 5, 1 << 16])
@given(
    rows=st.lists(st.tuples(st.sampled_from([A, B, C]), st.booleans()), min_size=1, max_size=30),
    size=st.integers(1, 31),
)
def test_blocks_make_no_difference(sorted_rows: int, rows: list[tuple[Cell, bool]], size: int) -> None:
    table = prepared([cell for cell, _ in rows], refused=[i for i, (_, kept) in enumerate(rows) if not kept])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(census, "SORTED_ROWS", sorted_rows)
        whole, cut = census_of(table), census_of(*blocks(table, size))
        assert cut.counts == whole.counts
        assert cut.files == whole.files
        for cell in whole.counts:
            kept = [i for i, row in enumerate(rows) if row == (cell, True)]
            ids = table.column("id").take(pa.array(kept, pa.int64()))
            assert sorted(cut.hashes([cell]).tolist()) == sorted(hash_ids(ids).tolist())


def test_each_row_knows_its_cell() -> None:
    found, which = cells(prepared([B, A, B, C]))
    assert [found[i] for i in which] == [B, A, B, C]
    found, which = cells(prepared([]))
    assert (found, which.shape) == ([], (0,))


def test_an_empty_table_counts_nothing() -> None:
    counted = census_of(prepared([]), prepared([A]), pa.Table.from_batches([], schema=prepared([]).schema))
    assert counted.counts == {A: 1}
