"""The data path's streams: files -> rows -> examples, in order, in this process or on Ray Data.

Nothing here decides what a row becomes (`rows`), which rows are trained (`selection`) or in which order (`feed`); this
only spreads the work over CPUs and keeps what is in flight small.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sft.base import BaseTokenizer, load_tokenizer
from sft.data_config import DataSection, HygieneSection
from sft.errors import DataError
from sft.files import RowFile, list_files, read
from sft.formats import RowSpec, to_conversation
from sft.holdout import HoldOut
from sft.hygiene import Found, HygieneRules, plan_hygiene
from sft.messages import Conversation, RowError
from sft.mixture import EpochPlan
from sft.order import CHUNK_ROWS, Queue, Reading, read_in_order
from sft.rows import Rules, SourcePlan, parse, prepare, records

BLOCK_BYTES = 4 << 20
"""Target size of a block: small enough that a few in flight fit anywhere, large enough to amortise a task."""
STORE_SHARE = 0.25
"""Share of the object store that a stream plans with. Ray Data's own half leaves out the blocks that tasks and readers
hold, and with them a small store spilled to disk."""


@dataclass(frozen=True, slots=True)
class DataPlan:
    """All that turning files into examples depends on; picklable, and the same on every node.

    Rule: `found` is what a comparison of all rows found, None before it or where there is none;
    `set_aside` is the share of the rows that is not trained but evaluated.
    """

    files: tuple[RowFile, ...]
    sources: Mapping[str, SourcePlan]
    base: Path
    template: str | None
    quick: bool
    rules: Rules
    hold_out: HoldOut
    hygiene: HygieneRules
    found: Found | None = None
    set_aside: float = 0.0

    def tokenizer(self) -> BaseTokenizer:
        """The tokenizer and template that the rows are masked with, proven; loaded once a process."""
        return load_tokenizer(self.base, self.template, history=self.rules.history, quick=self.quick)

    @property
    def fingerprint(self) -> str:
        """What tells the files from others without reading them: their names and sizes."""
        named = sorted((file.source, file.name, file.size) for file in self.files)
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]


Task = Callable[[pa.Table, DataPlan], pa.Table]
Stream = Callable[[DataPlan, Task], Iterator[pa.Table]]
"""Runs a task over the RAW tables of all files, and gives its tables in file and row order."""


def plan_data(
    data: DataSection, base: Path, template: str | None = None, set_aside: float = 0.0, *, pairs: bool = False
) -> DataPlan:
    """Lists the files of all sources, and reads the evaluation files that rows must not repeat.

    Args:
        data: what to train on.
        base: folder of the base model, whose tokenizer is used.
        template: text of a chat template to use in place of the tokenizer's own.
        set_aside: share of the rows that is not trained but evaluated.
        pairs: whether the rows are pairs of answers.

    Raises:
        StorageError: a source is not there.
        DataError: a source is no file of rows.
    """
    files = [file for source in data.sources for file in list_files(source.path, source.label)]
    sources = {
        source.label: SourcePlan(
            RowSpec("preference" if pairs else source.format, tuple(source.columns.items()), tuple(data.mask.roles)),
            source.task or "",
            source.cluster or "",
        )
        for source in data.sources
    }
    rules = Rules(
        max_length=data.max_length,
        truncate=data.too_long == "truncate",
        history=data.mask.history,
        reasoning=data.mask.reasoning,
        prompt_weight=data.mask.prompt_weight,
        pairs=pairs,
    )
    return DataPlan(
        files=tuple(files),
        sources=sources,
        base=base.absolute(),
        template=template,
        quick=data.tokenizer == "auto",
        rules=rules,
        hold_out=HoldOut(frozenset(data.hold_out.tasks), frozenset(data.hold_out.clusters)),
        hygiene=plan_hygiene(data.hygiene, _evaluation(data.hygiene)),
        set_aside=set_aside,
    )


def prepare_rows(table: pa.Table, plan: DataPlan) -> pa.Table:
    """Makes a PREPARED table of a RAW one."""
    return prepare(
        table, plan.tokenizer(), plan.sources, plan.rules, plan.hold_out, plan.hygiene, plan.found, plan.set_aside
    )


def record_rows(table: pa.Table, plan: DataPlan) -> pa.Table:
    """Makes the records by which rows are compared with each other; one column, `record`."""
    return records(table, plan.sources, plan.hold_out, plan.hygiene, plan.set_aside)


def here(plan: DataPlan, task: Task, processes: int = 1) -> Iterator[pa.Table]:
    """Runs a task over all rows without Ray.

    Args:
        plan: what to read.
        task: what to do with a RAW table.
        processes: with more than one, as many run the task while this one reads; memory stays bounded.
    """
    raw = (table for file in plan.files for table in read(file))
    if processes == 1:
        yield from (task(table, plan) for table in raw)
        return
    _ = plan.tokenizer().encoder  # loaded once here, and shared by the processes that are forked
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for table in raw:
            waiting.append(pool.submit(task, table, plan))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def first_rows(plan: DataPlan, count: int) -> Iterator[pa.Table]:
    """Prepares the first so many rows of every source, in this process and no further."""
    for source in plan.sources:
        left = count
        files = tuple(file for file in plan.files if file.source == source)
        for table in here(dataclasses.replace(plan, files=files), prepare_rows):
            yield table.slice(0, left)
            left -= table.num_rows
            if left <= 0:
                break


def on_ray(plan: DataPlan, task: Task) -> Iterator[pa.Table]:
    """Runs a task over all rows on Ray Data, files in parallel."""
    import ray.data

    _configure()
    files = ray.data.from_items([dataclasses.asdict(file) for file in plan.files], override_num_blocks=len(plan.files))
    return _streamed(files, _read_files, lambda table: task(table, plan))


def epoch_on_ray(plan: DataPlan, order: Sequence[Sequence[Queue]], draw: EpochPlan | None) -> Iterator[pa.Table]:
    """Prepares an epoch on Ray Data, its files read side by side in the epoch's order.

    Args:
        plan: what to read.
        order: from `sft.order.reading_order`; its files are indices into the plan's.
        draw: how often each row is trained; None where every kept row is trained once.

    Returns:
        PREPARED tables of the rows that are trained, each as often as it is.
    """
    import ray.data

    _configure()
    epoch = ray.data.from_items([{"order": 0}], override_num_blocks=1)
    reads = functools.partial(_read_epoch, plan=plan, order=order)
    return _streamed(epoch, reads, functools.partial(_prepare_epoch, plan=plan, draw=draw))


def _configure() -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.override_object_store_memory_limit_fraction = STORE_SHARE


def _streamed(
    what: Any, reads: Callable[[pa.Table], Iterator[pa.Table]], task: Callable[[pa.Table], pa.Table]
) -> Iterator[pa.Table]:
    # Unequal CPU requests keep Ray from fusing the two steps, so one large file is still prepared in parallel.
    raw = what.map_batches(reads, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    made = raw.map_batches(task, batch_size=None, batch_format="pyarrow", num_cpus=1)
    yield from made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _read_files(batch: pa.Table) -> Iterator[pa.Table]:
    for item in batch.to_pylist():
        yield from read(RowFile(**item))


def _read_epoch(_: pa.Table, plan: DataPlan, order: Sequence[Sequence[Queue]]) -> Iterator[pa.Table]:
    def opened(reading: Reading) -> Iterator[pa.Table]:
        for table in read(plan.files[reading.file], CHUNK_ROWS):
            for name in ("part", "parts"):
                numbers = pa.array(np.full(table.num_rows, getattr(reading, name), np.int64))
                table = table.append_column(name, numbers)
            yield table

    return read_in_order(order, opened)


def _prepare_epoch(table: pa.Table, plan: DataPlan, draw: EpochPlan | None) -> pa.Table:
    made = prepare_rows(table, plan)
    if draw is not None:
        counts = draw.repeats(made, made.column("part").to_numpy(), made.column("parts").to_numpy())
        made = made.take(np.repeat(np.arange(made.num_rows), counts))
        made = made.filter(pc.equal(made.column("reason"), ""))
    if plan.hold_out:
        plan.hold_out.check(made.filter(pc.equal(made.column("reason"), "")))
    return made.drop(["part", "parts"])


def _evaluation(section: HygieneSection) -> Iterator[tuple[str, Iterator[Conversation]]]:
    for address in section.evaluation:
        for file in list_files(address, "evaluation"):
            yield file.name, _conversations(file)


def _conversations(file: RowFile) -> Iterator[Conversation]:
    found = False
    for table in read(file):
        for raw in table.column("raw").to_pylist():
            try:
                yield to_conversation(parse(raw))
                found = True
            except RowError:
                continue
    if not found:
        raise DataError(f"data.hygiene.evaluation: {file.address} holds no row of a known format to compare with")
