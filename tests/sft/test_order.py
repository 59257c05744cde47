from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.order import CHUNK_ROWS, FileSize, Queue, Reading, interleave, read_in_order, reading_order

FILES = st.lists(
    st.builds(FileSize, st.sampled_from("abc"), st.integers(1, 300), st.integers(0, 3)), min_size=1, max_size=20
)


def tables(name: int, rows: int, chunk: int = CHUNK_ROWS) -> Iterator[pa.Table]:
    for begin in range(0, rows, chunk):
        numbers = np.arange(begin, min(begin + chunk, rows))
        yield pa.table({"name": np.full(len(numbers), name), "row": numbers})


def names(stream: Iterator[pa.Table]) -> npt.NDArray[np.int64]:
    return np.concatenate([np.asarray(table.column("name")) for table in stream])


def epoch(files: list[FileSize], seed: int = 1, epoch: int = 0, open_files: int = 128) -> npt.NDArray[np.int64]:
    """The files' numbers, row by row."""
    order = reading_order(files, seed, epoch, open_files)
    return names(read_in_order(order, lambda reading: tables(reading.file, files[reading.file].rows)))


def unevenness(files: list[FileSize], read: npt.NDArray[np.int64], window: int) -> float:
    """How far, at most, a source's share in a window of the stream is from its share in all of it."""
    worst = 0.0
    for source in {file.source for file in files}:
        own = np.array([file.source == source for file in files])[read]
        before = np.concatenate([[0], np.cumsum(own)])
        held = (before[window:] - before[:-window]) / window
        worst = max(worst, float(np.abs(held - own.mean()).max()))
    return worst


def test_streams_are_merged_by_the_fraction_that_was_read() -> None:
    merged = interleave([tables(0, 40, 10), tables(1, 20, 10)], [40, 20], [10, 10])
    assert names(merged)[::10].tolist() == [0, 0, 1, 0, 0, 1]


@given(FILES, st.integers(0, 3), st.integers(1, 24))
def test_every_file_is_read_as_often_as_asked(files: list[FileSize], seed: int, open_files: int) -> None:
    order = reading_order(files, seed, 0, open_files)
    assert order == reading_order(files, seed, 0, open_files)
    assert sum(len(queues) for queues in order) <= open_files
    readings = [reading for queues in order for queue in queues for reading in queue.readings]
    assert Counter(readings) == Counter(
        Reading(number, part, file.passes) for number, file in enumerate(files) for part in range(file.passes)
    )
    for queues in order:
        for queue in queues:
            parts = [(reading.file, reading.part) for reading in queue.readings]
            assert all(parts.index((file, part - 1)) < parts.index((file, part)) for file, part in parts if part)


def test_another_epoch_or_seed_is_another_order() -> None:
    files = [FileSize("ab"[i % 2], 1000) for i in range(12)]
    orders = {epoch(files, seed, number).tobytes() for seed in (1, 2) for number in (0, 1)}
    assert len(orders) == 4
    assert epoch(files).tobytes() in orders


def test_passes_over_a_file_follow_each_other_through_the_whole_epoch() -> None:
    ((queue,),) = reading_order([FileSize("a", 100, 3)], 0, 0)
    assert queue == Queue(300, (Reading(0, 0, 3), Reading(0, 1, 3), Reading(0, 2, 3)))
    ((queue,),) = reading_order([FileSize("a", 100, 2), FileSize("a", 100, 2)], 0, 0, open_files=1)
    assert [reading.part for reading in queue.readings] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "files",
    [
        pytest.param([("abcde"[i % 5], 1.2) for i in range(100)], id="a hundred files of unequal size"),
        pytest.param([("abcde"[i % 5], 1.2) for i in range(300)], id="more files than may be open"),
        pytest.param([("abcde"[i % 5], 1.2) for i in range(300)] + [("z", 30_000)], id="and one large file"),
        pytest.param([(f"s{i}", 1.2) for i in range(80)], id="eighty sources"),
    ],
)
def test_every_stretch_has_the_mixture_s_proportions(files: list[tuple[str, float]]) -> None:
    random = np.random.default_rng(0)
    sizes = [
        FileSize(source, int(random.lognormal(6, spread)) + 1 if spread < 10 else int(spread))
        for source, spread in files
    ]
    read = epoch(sizes)
    assert unevenness(sizes, read, 10_000) < 2 * CHUNK_ROWS / 10_000
    assert unevenness(sizes, read, 2_000) < 2 * CHUNK_ROWS / 2_000


def test_files_in_random_order_one_after_the_other_would_not_pass_that_test() -> None:
    files = [FileSize("abcde"[i % 5], 500) for i in range(100)]
    shuffled = np.random.default_rng(0).permutation(100)
    assert unevenness(files, np.repeat(shuffled, 500), 2_000) > 0.2


def test_small_files_are_not_bunched() -> None:
    """A hundred files of one chunk beside a large one: read by fraction alone they would all come first."""
    read = epoch([FileSize("a", 10_000), *(FileSize("a", 50) for _ in range(100))])
    small = np.flatnonzero(read > 0)
    assert float(small.mean()) == pytest.approx(len(read) / 2, rel=0.05)
    assert np.histogram(small, 10, (0, len(read)))[0].tolist() == pytest.approx([500] * 10, abs=75)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8),
    chunk=st.integers(1, 100),
)
def test_wrong_sizes_lose_and_reorder_nothing(lengths: list[tuple[int, int]], chunk: int) -> None:
    readers = [tables(number, real, chunk) for number, (real, _) in enumerate(lengths)]
    read = list(interleave(readers, [stated for _, stated in lengths], [chunk] * len(lengths)))
    for number, (real, _) in enumerate(lengths):
        own = [table for table in read if table.column("name")[0].as_py() == number]
        assert [row for table in own for row in table.column("row").to_pylist()] == list(range(real))


def test_a_file_is_opened_when_it_is_due_and_no_more_than_allowed_at_once() -> None:
    opened: set[int] = set()
    most = 0

    def read(reading: Reading) -> Iterator[pa.Table]:
        nonlocal most
        opened.add(reading.file)
        most = max(most, len(opened))
        yield from tables(reading.file, 640)
        opened.remove(reading.file)

    stream = read_in_order(reading_order([FileSize("ab"[i % 2], 640) for i in range(40)], 0, 0, 8), read)
    next(stream)
    assert len(opened) == 1
    assert sum(table.num_rows for table in stream) == 40 * 640 - CHUNK_ROWS
    assert most == 8
