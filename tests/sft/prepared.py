"""PREPARED tables of rows without content, as mixtures and hold-outs see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa

from sft.census import Cell, Census

COLUMNS = pa.schema(
    [(name, pa.string()) for name in ("id", "source", "task", "cluster", "file", "reason")] + [("position", pa.int64())]
)


def prepared(cells: Sequence[Cell], refused: Iterable[int] = (), first: int = 1) -> pa.Table:
    """One row of each cell, in one file a source; `refused` are the indices of rows that were not kept."""
    lost = set(refused)
    rows = [
        {
            "id": f"{cell.source}/rows.jsonl:{first + i}:0a1b2c",
            **cell._asdict(),
            "file": "rows.jsonl",
            "reason": "too_long" if i in lost else "",
            "position": first + i,
        }
        for i, cell in enumerate(cells)
    ]
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def of_counts(counts: Mapping[Cell, int]) -> pa.Table:
    return prepared([cell for cell, rows in counts.items() for _ in range(rows)])


def blocks(table: pa.Table, size: int) -> Iterator[pa.Table]:
    for begin in range(0, table.num_rows, size):
        yield table.slice(begin, size)


def census_of(*tables: pa.Table) -> Census:
    census = Census()
    for table in tables:
        census.add(table)
    return census
