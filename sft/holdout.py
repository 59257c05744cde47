"""Tasks and clusters that are never trained, and the proof that none of them is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sft.census import Cell, cells
from sft.errors import DataError


@dataclass(frozen=True, slots=True)
class HoldOut:
    """What is not trained: rows of these tasks, and rows of these clusters."""

    tasks: frozenset[str] = field(default_factory=frozenset)
    clusters: frozenset[str] = field(default_factory=frozenset)

    def __bool__(self) -> bool:
        """Whether anything is held out."""
        return bool(self.tasks or self.clusters)

    def holds(self, cell: Cell) -> bool:
        """Whether a cell's rows are held out."""
        return cell.task in self.tasks or cell.cluster in self.clusters

    def check(self, table: pa.Table) -> None:
        """Makes sure, on the way to training, that a table holds nothing that is held out.

        Raises:
            DataError: it does; that is a fault of raysft, as such rows are taken out before.
        """
        for cell in cells(table)[0]:
            if self.holds(cell):
                raise DataError(
                    f"{cell.source}: rows of task {cell.task!r} in cluster {cell.cluster!r} are held out and were "
                    "about to be trained; this is a fault of raysft, please report it"
                )


@dataclass(frozen=True, slots=True)
class Names:
    """What some rows name: their tasks and clusters in alphabetical order, and how many rows they are."""

    tasks: tuple[str, ...]
    clusters: tuple[str, ...]
    rows: int


@dataclass(frozen=True, slots=True)
class HoldOutReport:
    """What is trained and what is held out.

    Rule: no task and no cluster is in both, as far as tasks and clusters are held out. `unnamed` counts trained rows
    that name no task while tasks are held out, or no cluster while clusters are: nothing can be proven of these.
    """

    trained: Names
    held_out: Names
    unnamed: int

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return dataclasses.asdict(self)


def prove(counts: Mapping[Cell, int], hold_out: HoldOut) -> HoldOutReport:
    """Proves of a whole data set that what is held out is not trained.

    Args:
        counts: kept rows of every cell that was read, those with none among them.
        hold_out: what is not trained.

    Raises:
        DataError: a held-out name occurs nowhere, so it is misspelt; or a task is held out by its cluster in one place
            and trained in another, where its rows name another cluster or none. All such names are told at once.
    """
    held = [cell for cell in counts if hold_out.holds(cell)]
    trained = [cell for cell, rows in counts.items() if rows and not hold_out.holds(cell)]
    tasks, clusters = {cell.task for cell in counts}, {cell.cluster for cell in counts}
    faults = [
        *_unknown("tasks", hold_out.tasks - tasks, tasks),
        *_unknown("clusters", hold_out.clusters - clusters, clusters),
        *_split(held, trained),
    ]
    if faults:
        raise DataError("\n".join(["the hold-out cannot be kept:", *(f"  - {fault}" for fault in faults)]))
    unnamed = sum(
        counts[cell]
        for cell in trained
        if (hold_out.tasks and not cell.task) or (hold_out.clusters and not cell.cluster)
    )
    return HoldOutReport(
        _names(trained, counts, {cell.cluster for cell in trained}),
        _names(held, counts, {cell.cluster for cell in held} & hold_out.clusters),
        unnamed,
    )


def _names(of: Collection[Cell], counts: Mapping[Cell, int], clusters: set[str]) -> Names:
    tasks = {cell.task for cell in of}
    return Names(tuple(sorted(tasks - {""})), tuple(sorted(clusters - {""})), sum(counts[cell] for cell in of))


def _unknown(kind: str, missing: frozenset[str], known: set[str]) -> list[str]:
    faults = []
    for name in sorted(missing):
        near = difflib.get_close_matches(name, known - {""}, n=1)
        hint = f"did you mean {near[0]}?" if near else f"{len(known - {''})} {kind} occur in the data"
        faults.append(f"data.hold_out.{kind}: no row names {name!r}, so all would be trained; {hint}")
    return faults


def _split(held: Collection[Cell], trained: Collection[Cell]) -> list[str]:
    """Faults of tasks of which some rows are held out and others trained."""
    places = {cell.task: cell for cell in sorted(held) if cell.task}
    return [
        f"task {cell.task!r} is held out with cluster {places[cell.task].cluster!r} in source "
        f"{places[cell.task].source!r}, but trained from source {cell.source!r}, where its cluster is "
        f"{cell.cluster!r}: give its rows one cluster, or name the task in data.hold_out.tasks"
        for cell in sorted(trained)
        if cell.task in places
    ]
