"""The order in which an epoch reads its files: many at once and each evenly, so that every stretch is the mixture.

Next comes a chunk of the source of which the smallest fraction has been read, and in it of the file of which the
smallest fraction has been read. So a source with a hundredth of the rows has a hundredth of every stretch, whatever the
sizes of its files, and nothing is read ahead. Where there are more files than may be open at once, some of a source
share a queue in which they follow each other.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

OPEN_FILES = 128
"""Files that are open at once; an open one takes a few megabytes."""
CHUNK_ROWS = 64
"""Rows that are taken from a file at a time."""


@dataclass(frozen=True, slots=True)
class FileSize:
    """A file to read.

    Args:
        source: whose file it is.
        rows: how many it has; what counts is the ratio to the other files' rows, so an estimate does.
        passes: how often it is read in an epoch.
    """

    source: str
    rows: int
    passes: int = 1


@dataclass(frozen=True, slots=True)
class Reading:
    """One pass over a file: number `part` of `parts`. `file` is its index."""

    file: int
    part: int
    parts: int


@dataclass(frozen=True, slots=True)
class Queue:
    """Readings that follow each other through the whole epoch; `rows` is the length of all together."""

    rows: int
    readings: tuple[Reading, ...]


def reading_order(
    files: Sequence[FileSize], seed: int, epoch: int, open_files: int = OPEN_FILES
) -> tuple[tuple[Queue, ...], ...]:
    """Plans the reading of an epoch: a function of (seed, epoch) and of the files alone.

    Returns:
        The queues of each source, at most `open_files` of all sources together.
    """
    by_source: dict[str, list[int]] = defaultdict(list)
    many = len({file.source for file in files if file.passes}) > open_files
    for number in np.random.default_rng([seed, epoch]).permutation(len(files)).tolist():
        if files[number].passes:
            by_source["" if many else files[number].source].append(number)
    total = sum(len(numbers) for numbers in by_source.values())
    spare = min(open_files, total) - len(by_source)
    order = []
    for numbers in by_source.values():
        count = 1 + len(numbers) * spare // total
        order.append(tuple(_queue(numbers[first::count], files) for first in range(count)))
    return tuple(order)


def read_in_order(
    order: Sequence[Sequence[Queue]], read: Callable[[Reading], Iterator[pa.Table]], chunk: int = CHUNK_ROWS
) -> Iterator[pa.Table]:
    """Reads an epoch.

    Args:
        order: from `reading_order`.
        read: opens a file and gives its tables; called when the reading's first table is due.
        chunk: the most rows that a table has.
    """

    def merged(queues: Sequence[Queue], streams: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
        # A table is no longer than the file that it is read from.
        chunks = [min(chunk, -(-queue.rows // len(queue.readings))) for queue in queues]
        return interleave(streams, [queue.rows for queue in queues], chunks)

    sources = [
        merged(queues, [itertools.chain.from_iterable(map(read, queue.readings)) for queue in queues])
        for queues in order
    ]
    return merged([_joined(queues) for queues in order], sources)


def interleave(
    readers: Sequence[Iterator[pa.Table]], sizes: Sequence[int], chunks: Sequence[int]
) -> Iterator[pa.Table]:
    """Merges streams of tables so that at any time about the same fraction of each has been given.

    A stream that is shorter or longer than its size says is given to its end all the same.

    Args:
        readers: the streams; none is touched before its first table is due.
        sizes: rows of each, or numbers in proportion to them.
        chunks: about how much of that each table is.
    """
    read = [0] * len(readers)

    def due(number: int) -> tuple[float, int]:
        # Streams start at different phases, or all short ones would come at once.
        following = min(chunks[number], max(sizes[number] - read[number], 1)) * number / len(readers)
        return (read[number] + following) / max(sizes[number], 1), number

    waiting = [due(number) for number in range(len(readers))]
    heapq.heapify(waiting)
    while waiting:
        number = waiting[0][1]
        table = next(readers[number], None)
        if table is None:
            heapq.heappop(waiting)
        else:
            yield table
            read[number] += table.num_rows
            heapq.heapreplace(waiting, due(number))


def _queue(numbers: Sequence[int], files: Sequence[FileSize]) -> Queue:
    readings = [
        ((part + place / len(numbers)) / files[number].passes, Reading(number, part, files[number].passes))
        for place, number in enumerate(numbers)
        for part in range(files[number].passes)
    ]
    readings.sort(key=lambda timed: timed[0])
    rows = sum(files[number].rows * files[number].passes for number in numbers)
    return Queue(rows, tuple(reading for _, reading in readings))


def _joined(queues: Sequence[Queue]) -> Queue:
    """A source's queues as one: what it has of the whole epoch."""
    return Queue(sum(queue.rows for queue in queues), tuple(reading for queue in queues for reading in queue.readings))
