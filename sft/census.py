"""How many rows there are of what: counted once by source, task, cluster and file, for the mixture and the hold-out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft.messages import Reason
from sft.rowkey import Hashes, hash_ids

Indices = npt.NDArray[np.int64]

SORTED_ROWS = 1 << 16
"""Rows whose hashes are sorted into their cells together: there may be more cells than rows in a table."""


class Cell(NamedTuple):
    """The rows of one source, task and cluster; task and cluster are empty where neither row nor source names one."""

    source: str
    task: str
    cluster: str


@dataclass
class FileCount:
    """One file: rows as read, and kept rows by cell."""

    rows: int = 0
    kept: Counter[Cell] = field(default_factory=Counter)


class Census:
    """Adds up PREPARED tables. Holds 8 bytes a kept row: the hash of its id, from which sub-samples are drawn.

    Attributes:
        counts: kept rows by cell, held-out ones among them; 0 where rows were read but none was kept.
        files: by (source, file).
    """

    def __init__(self) -> None:
        self.counts: dict[Cell, int] = {}
        self.files: dict[tuple[str, str], FileCount] = {}
        self._numbers: dict[Cell, int] = {}
        self._hashes: dict[Cell, list[Hashes]] = {}
        self._unsorted: list[tuple[Hashes, Indices]] = []
        self._waiting = 0

    def add(self, table: pa.Table) -> None:
        """Counts a PREPARED table; reads its columns id, source, file, position, task, cluster and reason."""
        if not table.num_rows:
            return
        keys, which = distinct(table, "source", "task", "cluster", "file")
        kept = np.asarray(pc.is_in(table.column("reason"), pa.array(["", Reason.HELD_OUT])))
        kept_rows = np.bincount(which[kept], minlength=len(keys)).tolist()
        last = np.zeros(len(keys), np.int64)
        np.maximum.at(last, which, np.asarray(table.column("position")))
        numbers = np.empty(len(keys), np.int64)
        for key, ((source, task, cluster, file), rows, position) in enumerate(
            zip(keys, kept_rows, last.tolist(), strict=True)
        ):
            cell = Cell(source, task, cluster)
            numbers[key] = self._numbers.setdefault(cell, len(self._numbers))
            self.counts[cell] = self.counts.get(cell, 0) + rows
            count = self.files.setdefault((source, file), FileCount())
            count.rows = max(count.rows, position)
            count.kept[cell] += rows
        self._unsorted.append((hash_ids(table.column("id"))[kept], numbers[which[kept]]))
        self._waiting += len(self._unsorted[-1][0])
        if self._waiting >= SORTED_ROWS:
            self._sort()

    def hashes(self, of: Sequence[Cell]) -> Hashes:
        """The id hashes of all kept rows of some cells, in no particular order."""
        self._sort()
        parts = [part for cell in of for part in self._hashes.get(cell, ())]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)

    def _sort(self) -> None:
        if not self._unsorted:
            return
        hashes, numbers = (np.concatenate(parts) for parts in zip(*self._unsorted, strict=True))
        self._unsorted, self._waiting = [], 0
        order = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(self._numbers)))
        for cell, part in zip(self._numbers, np.split(hashes[order], ends[:-1]), strict=True):
            if len(part):
                self._hashes.setdefault(cell, []).append(part.copy())


def cells(table: pa.Table) -> tuple[list[Cell], Indices]:
    """The distinct cells of a PREPARED table, and for each row the index of its own."""
    keys, which = distinct(table, "source", "task", "cluster")
    return [Cell(*key) for key in keys], which


def distinct(table: pa.Table | pa.RecordBatch, *columns: str) -> tuple[list[tuple[str, ...]], Indices]:
    """The distinct values of some string columns together, and for each row the index of its own."""
    codes = np.zeros(table.num_rows, np.int64)
    whole = [
        column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        for column in map(table.column, columns)
    ]
    encoded = [column.dictionary_encode() for column in whole]
    for column in encoded:
        codes = codes * max(len(column.dictionary), 1) + np.asarray(column.indices)
    _, first, which = np.unique(codes, return_index=True, return_inverse=True)
    values = [np.array(column.dictionary.to_pylist(), object)[np.asarray(column.indices)[first]] for column in encoded]
    return list(zip(*values, strict=True)), which
