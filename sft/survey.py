"""What a data set holds: counted once, before anything is trained, so that nothing is lost silently.

Whole columns are counted, never single rows, so one core counts far more rows than many can prepare. What is held grows
by 16 bytes with each kept row, and not with the rows that were dropped.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from sft.census import Cell, Census, distinct
from sft.errors import DataError
from sft.lengths import Lengths
from sft.mask import UNTRAINED
from sft.rows import PREPARED

EXCLUSIONS = frozenset(
    {
        "held_out",
        "set_aside",
        "duplicate",
        "near_duplicate",
        "contradiction",
        "contaminated",
        "personal_data",
        "sampled_out",
    }
)
"""Reasons for which a row is left out because the config asks for it. All others are faults of the row."""

PLACES_HELD = 100
"""Dropped rows of one source and reason that a survey holds; the others are only counted."""
PLACES_SHOWN = 3

_PLACE = pa.schema(
    [PREPARED.field(name) for name in ("id", "source", "file", "position", "reason", "field", "message")]
)

Integers = npt.NDArray[np.int64]
Name = TypeVar("Name")


@dataclass
class Count:
    """Counts of some rows. `tokens`, `trained_tokens` and `flags` are of the kept rows."""

    rows: int = 0
    kept: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    flags: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> Counter[str]:
        """Rows that could not be used, by reason."""
        return Counter({reason: count for reason, count in self.dropped.items() if reason not in EXCLUSIONS})

    @property
    def excluded(self) -> Counter[str]:
        """Rows that the config asks to leave out, by reason."""
        return self.dropped - self.faults

    def add(self, other: Count) -> None:
        """Adds another count to this one."""
        self.rows += other.rows
        self.kept += other.kept
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens
        if other.dropped or other.flags:
            self.dropped.update(other.dropped)
            self.flags.update(other.flags)

    def to_dict(self) -> dict[str, Any]:
        """The count as plain values, for JSON."""
        return {
            "rows": self.rows,
            "kept": self.kept,
            "dropped": dict(self.dropped.most_common()),
            "flags": dict(self.flags.most_common()),
            "tokens": self.tokens,
            "trained_tokens": self.trained_tokens,
        }


class Origin(NamedTuple):
    """Where a kept row comes from: its cell, and its file."""

    source: str
    task: str
    cluster: str
    file: str


@dataclass(frozen=True, slots=True, eq=False)
class KeptRows:
    """The kept rows in the order in which they were counted, which is file and row order.

    Rule: every array has shape (kept,). `lengths` are tokens; `of[i]` is row i's index into `origins`.
    """

    lengths: npt.NDArray[np.int32]
    of: npt.NDArray[np.int32]
    origins: tuple[Origin, ...]


class Survey:
    """Adds up PREPARED tables. A survey can be pickled.

    Attributes:
        cells: counts by source, task and cluster, in the order in which they came.
        census: kept rows by cell and file, from which mixtures are made; held-out rows among them.
    """

    def __init__(self) -> None:
        self.cells: dict[Cell, Count] = {}
        self.census = Census()
        self._origins: dict[Origin, int] = {}
        self._lengths = array("i")
        self._of = array("i")
        self._places: list[pa.RecordBatch] = []
        self._held: Counter[tuple[str, ...]] = Counter()
        self._sum = 0

    def add(self, table: pa.Table) -> None:
        """Counts a PREPARED table."""
        self.census.add(table)
        for batch in table.to_batches():
            if batch.num_rows:
                self._add(batch)

    @property
    def sources(self) -> dict[str, Count]:
        """Counts by source, in the order in which they came."""
        return self._by(lambda cell: cell.source)

    @property
    def tasks(self) -> dict[tuple[str, str], Count]:
        """Counts by (cluster, task)."""
        return self._by(lambda cell: (cell.cluster, cell.task))

    @property
    def total(self) -> Count:
        """Counts of all rows together."""
        return self._by(lambda _: "").get("", Count())

    @property
    def rows(self) -> int:
        """Rows read."""
        return self.total.rows

    @property
    def kept(self) -> int:
        """Rows that are trained on."""
        return self.total.kept

    @property
    def tokens(self) -> int:
        """Tokens of the kept rows."""
        return self.total.tokens

    @property
    def trained_tokens(self) -> int:
        """Tokens that carry a label."""
        return self.total.trained_tokens

    @property
    def dropped(self) -> Counter[str]:
        """Rows that were not kept, by reason."""
        return self.total.dropped

    @property
    def refused(self) -> list[dict[str, Any]]:
        """The first dropped rows of every source and reason, with place, reason, field and message."""
        held: list[dict[str, Any]] = pa.Table.from_batches(self._places, _PLACE).to_pylist()
        return held

    @property
    def kept_rows(self) -> KeptRows:
        """Length, key and origin of every kept row."""
        return KeptRows(
            np.array(self._lengths, np.int32),
            np.array(self._of, np.int32),
            tuple(self._origins),
        )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the kept rows, as checkpoints and bundles carry it.

        The sum of a 128-bit hash of each row id (which holds a content hash), so it does not depend on order or blocks.
        """
        return f"{self._sum % (1 << 128):032x}"

    def lengths(self) -> Lengths:
        """How long the kept rows are."""
        return Lengths.of(np.sort(np.array(self._lengths, np.int32)))

    def lengths_by_source(self) -> dict[str, Lengths]:
        """How long the kept rows of each source are."""
        numbers = {name: number for number, name in enumerate(self.sources)}
        source_of = np.asarray([numbers[origin.source] for origin in self._origins], np.int64)
        ordered = source_of[np.asarray(self._of, np.int32)] << 32 | np.asarray(self._lengths, np.int64)
        ordered.sort()
        ends = np.searchsorted(ordered, np.arange(len(numbers) + 1) << 32)
        return {name: Lengths.of(ordered[ends[i] : ends[i + 1]] & 0xFFFFFFFF) for name, i in numbers.items()}

    def check(self, max_bad_fraction: float) -> None:
        """Refuses a data set that is not fit to train on. Rows that the config leaves out are no fault.

        Raises:
            DataError: there are no rows, none was kept, or more than the allowed share is bad.
        """
        total = self.total
        if not total.rows:
            raise DataError("the data holds no rows; check data.sources")
        if total.kept and total.faults.total() <= max_bad_fraction * total.rows:
            return
        counted = total.faults if total.kept else total.dropped
        reasons = ", ".join(f"{count} {reason}" for reason, count in counted.most_common())
        shown = [row for row in self.refused if row["reason"] in counted][:PLACES_SHOWN]
        places = "\n".join(f"  - {place(row)}: {row['message']}" for row in shown)
        allowed = (
            "nothing is left to train on"
            if not total.kept
            else f"the limit is {max_bad_fraction:.1%} (data.max_bad_fraction)"
        )
        raise DataError(
            f"{counted.total()} of {total.rows} rows cannot be used ({reasons}); {allowed}. The first:\n{places}\n"
            "`python -m jobs.inspect_data --quarantine FILE` with the same config writes down all of them."
        )

    def quarantine(self) -> bytes:
        """The rows of `refused` as JSON lines. `survey` hands on the lines of all dropped rows."""
        return _lines(self.refused)

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain values, for JSON."""
        by_source = self.lengths_by_source()
        clusters: dict[str, dict[str, dict[str, int]]] = {}
        for (cluster, task), count in self.tasks.items():
            if cluster or task:
                clusters.setdefault(cluster, {})[task] = {"rows": count.rows, "kept": count.kept}
        return {
            **self.total.to_dict(),
            **self.lengths().to_dict(),
            "fingerprint": self.fingerprint,
            "sources": {name: {**count.to_dict(), **by_source[name].to_dict()} for name, count in self.sources.items()},
            "clusters": clusters,
        }

    def _add(self, batch: pa.RecordBatch) -> None:
        names, of_row = distinct(batch, *Origin._fields, "reason")
        parts = [Count(rows=rows) for rows in np.bincount(of_row, minlength=len(names)).tolist()]
        tokens = _list_lengths(batch.column("input_ids"))
        trained = _trained(batch.column("labels"))
        sums = [np.bincount(of_row, weights, len(names)).astype(np.int64).tolist() for weights in (tokens, trained)]
        flags = _flags(batch.column("flags"), of_row, len(names))
        numbers = np.full(len(names), -1, np.int32)
        for i, ((*origin, reason), part) in enumerate(zip(names, parts, strict=True)):
            part.tokens, part.trained_tokens, part.flags = sums[0][i], sums[1][i], flags[i]
            if reason:
                part.dropped[reason] = part.rows
            else:
                part.kept = part.rows
                numbers[i] = self._number(Origin(*origin))
            self.cells.setdefault(Cell(*origin[:3]), Count()).add(part)
        of = numbers[of_row]
        kept = of >= 0
        ids = batch.column("id")
        if not kept.all():
            if any(self._held[name[0], name[-1]] < PLACES_HELD for name in names if name[-1]):
                self._hold(batch.select(_PLACE.names).filter(pa.array(~kept)))
            tokens, of, ids = tokens[kept], of[kept], ids.filter(pa.array(kept))
        self._keep(ids, tokens, of)

    def _keep(self, ids: pa.Array, tokens: Integers, of: npt.NDArray[np.int32]) -> None:
        digests = b"".join([hashlib.blake2b(i, digest_size=16).digest() for i in ids.cast(pa.binary()).to_pylist()])
        limbs = np.frombuffer(digests, ">u4").reshape(-1, 4).sum(axis=0, dtype=np.uint64).tolist()
        self._sum += sum(limb << shift for limb, shift in zip(limbs, (96, 64, 32, 0), strict=True))
        self._lengths.frombytes(tokens.astype(np.int32).tobytes())
        self._of.frombytes(of.tobytes())

    def _hold(self, places: pa.RecordBatch) -> None:
        """Holds as many of these dropped rows as there is room for."""
        names, of_row = distinct(places, "source", "reason")
        taken = []
        for i, name in enumerate(names):
            if self._held[name] < PLACES_HELD:
                taken.append(np.flatnonzero(of_row == i)[: PLACES_HELD - self._held[name]])
                self._held[name] += len(taken[-1])
        if taken:
            self._places.append(places.take(pa.array(np.sort(np.concatenate(taken)))))

    def _number(self, origin: Origin) -> int:
        return self._origins.setdefault(origin, len(self._origins))

    def _by(self, name: Callable[[Cell], Name]) -> dict[Name, Count]:
        counts: dict[Name, Count] = {}
        for cell, count in self.cells.items():
            counts.setdefault(name(cell), Count()).add(count)
        return counts


def survey(tables: Iterable[pa.Table], quarantine: Callable[[bytes], object] | None = None) -> Survey:
    """Counts all tables of a data set.

    Args:
        tables: PREPARED tables.
        quarantine: takes the dropped rows as JSON lines (place, reason, field and message; never the content), some
            at a time, so that any number of them needs no memory.
    """
    counted = Survey()
    for table in tables:
        counted.add(table)
        if quarantine is not None:
            lines = quarantine_lines(table)
            if lines:
                quarantine(lines)
    return counted


def quarantine_lines(table: pa.Table) -> bytes:
    """The dropped rows of a PREPARED table as JSON lines: place, reason, field and message; never the content."""
    return _lines(table.select(_PLACE.names).filter(pc.not_equal(table.column("reason"), "")).to_pylist())


def place(row: Mapping[str, Any]) -> str:
    """Where a dropped row lies and why it was dropped, in a few words."""
    where = f"{row['file']}:{row['position']}"
    return f"{where} {row['reason']} in {row['field']}" if row["field"] else f"{where} {row['reason']}"


def _lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _list_lengths(lists: pa.ListArray) -> Integers:
    lengths: Integers = pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int64)
    return lengths


def _trained(labels: pa.ListArray) -> Integers:
    """Trained tokens of each row."""
    lengths = _list_lengths(labels)
    filled = lengths > 0
    counts = np.zeros(len(lengths), np.int64)
    if filled.any():
        trained = labels.flatten().to_numpy() != UNTRAINED
        starts = (np.cumsum(lengths) - lengths)[filled]
        counts[filled] = np.add.reduceat(trained.view(np.uint8), starts, dtype=np.int32)
    return counts


def _flags(flags: pa.ListArray, of_row: Integers, groups: int) -> list[Counter[str]]:
    """Counts the flags of each group of rows."""
    counts: list[Counter[str]] = [Counter() for _ in range(groups)]
    encoded = flags.flatten().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    if names:
        code = of_row[pc.list_parent_indices(flags).to_numpy()] * len(names) + encoded.indices.to_numpy()
        for number, count in zip(*(part.tolist() for part in np.unique(code, return_counts=True)), strict=True):
            counts[number // len(names)][names[number % len(names)]] = count
    return counts
