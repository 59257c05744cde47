"""How often each row is trained in an epoch: shares of sources or tasks, as exact numbers of rows, and the draw.

A share is first made a whole number of rows, the group's target. Of m rows wanted and n there are, every row is trained
m // n times, and a sub-sample of exactly m % n rows once more: those with the smallest keys, where a key is a hash of
(seed, epoch, group, row id). So whoever streams the rows needs two numbers a group, in whatever order they come.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sft.census import Cell, Census, cells
from sft.errors import DataError
from sft.holdout import HoldOut
from sft.rowkey import Hashes, hash_ids, row_keys, salt

Mode = Literal["proportional", "temperature", "explicit"]
Over = Literal["source", "task"]

DRAWS = 8
"""Salts to try for a sub-sample: one does unless two ids have the same 64-bit hash just where the sub-sample ends."""
SHOWN = 5


@dataclass(frozen=True, slots=True)
class Mixture:
    """What an epoch shall hold.

    Args:
        over: what has a share: each source, or each task of each source. These are the groups.
        mode: a group's share is in proportion to its capped size, to that to the power of 1 / temperature, or to its
            weight.
        temperature: 1 or more; read in mode temperature.
        cap: size above which a group counts no more.
        rows: rows of an epoch; by default the sum of the capped sizes.
        weights: of sources; with `over` task, of each task of the source that has none of its own.
        task_weights: of tasks.
        limits: most rows of an epoch, by source; with `over` task, of each task of the source.
    """

    over: Over = "source"
    mode: Mode = "proportional"
    temperature: float = 1.0
    cap: int | None = None
    rows: int | None = None
    weights: Mapping[str, float] = field(default_factory=dict)
    task_weights: Mapping[str, float] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class Group:
    """What has a share of the mixture: a task of a source, or, where `task` is None, the source."""

    source: str
    task: str | None = None

    def __str__(self) -> str:
        return self.source if self.task is None else f"{self.source}/{self.task or '(no task)'}"


@dataclass(frozen=True, slots=True)
class Share:
    """What every epoch holds of one group: `target` rows of the `kept` ones in its cells."""

    group: Group
    cells: tuple[Cell, ...]
    kept: int
    target: int


def shares(counts: Mapping[Cell, int], mixture: Mixture, hold_out: HoldOut) -> tuple[Share, ...]:
    """Makes the mixture whole numbers of rows, by largest remainder: they add up to the epoch's rows exactly.

    Args:
        counts: kept rows by cell.
        mixture: what an epoch shall hold.
        hold_out: what it shall not.

    Returns:
        A share of every group that has rows to train, in alphabetical order; a target may be 0.

    Raises:
        DataError: the mixture cannot be had from these rows; all faults of one kind are told at once.
    """
    members: dict[Group, list[Cell]] = defaultdict(list)
    for cell in sorted(counts):
        if counts[cell] and not hold_out.holds(cell):
            members[Group(cell.source, cell.task if mixture.over == "task" else None)].append(cell)
    if not members:
        raise DataError("no row is left to train: all are refused or held out (data.hold_out)")
    kept = {group: sum(counts[cell] for cell in of) for group, of in members.items()}
    limits = {group: mixture.limits[group.source] for group in kept if group.source in mixture.limits}
    sizes = {group: min(rows, limits.get(group, rows), mixture.cap or rows) for group, rows in kept.items()}
    if mixture.mode == "explicit":
        wanted = _weights(kept, counts, mixture, hold_out)
    else:
        power = 1 / mixture.temperature if mixture.mode == "temperature" else 1.0
        wanted = {group: Fraction(size**power) for group, size in sizes.items()}
    targets = _apportion(mixture.rows or sum(sizes.values()), wanted, limits)
    return tuple(Share(group, tuple(members[group]), kept[group], targets[group]) for group in kept)


def passes(census: Census, of: Iterable[Share]) -> dict[tuple[str, str], int]:
    """How often an epoch reads each file, by (source, file); 0 where nothing of it is trained.

    A file whose rows are trained k times on average is read k times, so that the copies of a row lie far apart. No more
    rows are read than there are and than are trained, together.
    """
    rate = {cell: Fraction(share.target, share.kept) for share in of for cell in share.cells}
    numbers = {}
    for place, file in census.files.items():
        trained = sum((rate.get(cell, Fraction()) * kept for cell, kept in file.kept.items()), Fraction())
        numbers[place] = -(-trained // file.kept.total()) if trained else 0
    return numbers


@dataclass(frozen=True, slots=True)
class Draw:
    """How often a cell's rows are trained: `copies` times, once more where the key under `salt` is below `bound`."""

    copies: int
    salt: int
    bound: int


_NOTHING = Draw(0, 0, 0)


@dataclass(frozen=True, slots=True)
class EpochPlan:
    """One epoch's draw: a few numbers a cell, whatever the number of rows.

    Rule: over all kept rows of the data set, the repeats add up to `rows`, and by group to the group's target.
    """

    rows: int
    draws: Mapping[Cell, Draw]

    def repeats(
        self, table: pa.Table, part: int | npt.NDArray[np.int64] = 0, parts: int | npt.NDArray[np.int64] = 1
    ) -> npt.NDArray[np.int64]:
        """How often each row of a table is trained. Rows that are held out, or of a cell never counted, are not.

        Args:
            table: any rows, with the PREPARED columns id, source, task and cluster. Whether a row was kept is not
                looked at.
            part: which of the passes over the row's file this is; one for all rows, or shape (rows,).
            parts: how many passes there are, likewise; a row's repeats are spread evenly over them.

        Returns:
            Shape (rows,).
        """
        found, which = cells(table)
        draws = [self.draws.get(cell, _NOTHING) for cell in found]
        hashes = hash_ids(table.column("id"))
        salts, bounds = (
            np.array([getattr(draw, name) for draw in draws], np.uint64)[which] for name in ("salt", "bound")
        )
        copies = np.array([draw.copies for draw in draws], np.int64)[which]
        counts = copies + (row_keys(hashes, salts) < bounds)
        # A row's copies begin at a pass of its own, or the first pass would hold every row that is trained once.
        start = (row_keys(hashes, ~salts) % np.asarray(parts).astype(np.uint64)).astype(np.int64)
        drawn: npt.NDArray[np.int64] = ((part + 1) * counts + start) // parts - (part * counts + start) // parts
        return drawn


def plan_epoch(census: Census, of: Iterable[Share], seed: int, epoch: int) -> EpochPlan:
    """Draws an epoch's sub-samples.

    Raises:
        DataError: rows have the same id, so that they cannot be told apart.
    """
    draws: dict[Cell, Draw] = {}
    rows = 0
    for share in of:
        draw = _draw(census, share, seed, epoch)
        draws |= dict.fromkeys(share.cells, draw)
        rows += share.target
    return EpochPlan(rows, draws)


def _draw(census: Census, share: Share, seed: int, epoch: int) -> Draw:
    copies, extra = divmod(share.target, share.kept)
    group = share.group
    salts = [salt(seed, epoch, group.source, group.task, number) for number in range(DRAWS)]
    if not extra:
        return Draw(copies, salts[0], 0)
    hashes = census.hashes(share.cells)
    for one in salts:
        bound = _bound(row_keys(hashes, one), extra)
        if bound is not None:
            return Draw(copies, one, bound)
    raise DataError(f"{group}: rows have the same id, so no exact sub-sample of {extra} rows can be drawn")


def _bound(keys: Hashes, count: int) -> int | None:
    """The number below which exactly `count` keys lie; None where two equal keys stand in the way."""
    bound = np.partition(keys, count)[count]
    return int(bound) if np.count_nonzero(keys < bound) == count else None


def _weights(
    kept: Mapping[Group, int], counts: Mapping[Cell, int], mixture: Mixture, hold_out: HoldOut
) -> dict[Group, Fraction]:
    """The groups' weights in an explicit mixture."""
    held = {cell.source for cell in counts if hold_out.holds(cell)}
    idle = sorted(mixture.weights.keys() - {group.source for group in kept} - held)
    if idle:
        raise DataError(f"{_some(idle)}: has a weight in the mixture, but none of its rows was kept")
    strange = sorted(mixture.task_weights.keys() - {cell.task for cell in counts})
    if strange:
        raise DataError(f"data.mixture.weights: no row is of task {_some(strange)}")
    weights = {
        group: mixture.task_weights.get(group.task or "", mixture.weights.get(group.source, 0)) for group in kept
    }
    bare = [str(group) for group, weight in weights.items() if not weight]
    if bare:
        raise DataError(
            f"{_some(bare)}: has no weight in an explicit mixture; give its source a weight, or name its task in "
            "data.mixture.weights"
        )
    return {group: Fraction(weight) for group, weight in weights.items()}


def _apportion(rows: int, wanted: Mapping[Group, Fraction], limits: Mapping[Group, int]) -> dict[Group, int]:
    """Whole numbers that add up to `rows`, in proportion to `wanted`; what a limit cuts off goes to the others."""
    if len(limits) == len(wanted) and rows > sum(limits.values()):
        raise DataError(
            f"data.mixture.rows asks for {rows} rows, but the caps of the sources allow {sum(limits.values())}"
        )
    full: dict[Group, int] = {}
    while True:
        free = {group: share for group, share in wanted.items() if group not in full}
        rest = rows - sum(full.values())
        total = sum(free.values(), Fraction())
        quotas = {group: share * rest / total for group, share in free.items()}
        over = [group for group, quota in quotas.items() if group in limits and quota > limits[group]]
        if not over:
            break
        full |= {group: limits[group] for group in over}
    whole = {group: int(quota) for group, quota in quotas.items()}
    missing = rest - sum(whole.values())
    for group in sorted(quotas, key=lambda group: (whole[group] - quotas[group], group))[:missing]:
        whole[group] += 1
    return full | whole


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
