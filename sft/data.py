"""The data path on Ray Data: files -> rows -> examples, streaming and in order.

Nothing here decides what a row becomes (`rows`) or in which order it is trained (`feed`); this only spreads the work
over the cluster's CPUs and keeps blocks small.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import multiprocessing
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from sft.base import BaseTokenizer, load_tokenizer
from sft.config import DataSection
from sft.files import RowFile, list_files, read
from sft.formats import RowSpec
from sft.rows import Rules, SourcePlan, prepare

BLOCK_BYTES = 4 << 20
"""Target size of a block: small enough that a few in flight fit anywhere, large enough to amortise a task."""


@dataclass(frozen=True, slots=True)
class DataPlan:
    """All that turning files into examples depends on; small, picklable, and the same on every node."""

    files: tuple[RowFile, ...]
    sources: Mapping[str, SourcePlan]
    base: Path
    template: str | None
    quick: bool
    rules: Rules

    def tokenizer(self) -> BaseTokenizer:
        """The tokenizer and template that the rows are masked with, proven; loaded once a process."""
        return load_tokenizer(self.base, self.template, history=self.rules.history, quick=self.quick)

    @property
    def fingerprint(self) -> str:
        """What tells the files from others without reading them: their names and sizes."""
        named = sorted((file.source, file.name, file.size) for file in self.files)
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()[:32]


def plan_data(data: DataSection, base: Path, template: str | None = None) -> DataPlan:
    """Lists the files of all sources.

    Args:
        data: what to train on.
        base: folder of the base model, whose tokenizer is used.
        template: text of a chat template to use in place of the tokenizer's own.

    Raises:
        StorageError: a source is not there.
        DataError: a source is no file of rows.
    """
    files = [file for source in data.sources for file in list_files(source.path, source.label)]
    sources = {
        source.label: SourcePlan(
            RowSpec(source.format, tuple(source.columns.items()), tuple(data.mask.roles)),
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
    )
    return DataPlan(tuple(files), sources, base.absolute(), template, data.tokenizer == "auto", rules)


def stream_here(plan: DataPlan, processes: int = 1) -> Iterator[pa.Table]:
    """Prepares all rows without Ray, in file and row order.

    Args:
        plan: what to read.
        processes: with more than one, as many prepare while this one reads; memory stays bounded.
    """
    raw = (table for file in plan.files for table in read(file))
    if processes == 1:
        yield from (_prepare(table, plan) for table in raw)
        return
    _ = plan.tokenizer().encoder  # loaded once here, and shared by the processes that are forked
    with ProcessPoolExecutor(processes, multiprocessing.get_context("fork")) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        for table in raw:
            waiting.append(pool.submit(_prepare, table, plan))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def dataset(plan: DataPlan, order: Sequence[int] | None = None) -> Any:
    """Prepares all rows on Ray Data: a lazy `ray.data.Dataset` of PREPARED tables, in file and row order.

    Args:
        plan: what to read.
        order: indices of the files in the order to read them; all in their own order by default.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    files = [plan.files[i] for i in order] if order is not None else list(plan.files)
    rows = ray.data.from_items([dataclasses.asdict(file) for file in files], override_num_blocks=len(files))
    # Unequal CPU requests keep Ray from fusing the two steps, so one large file is still prepared in parallel.
    read_rows = rows.map_batches(_read_files, batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    prepared = functools.partial(_prepare, plan=plan)
    return read_rows.map_batches(prepared, batch_size=None, batch_format="pyarrow", num_cpus=1)


def tables(prepared: Any) -> Iterator[pa.Table]:
    """Streams a dataset's blocks in order as PREPARED tables."""
    yield from prepared.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _read_files(batch: pa.Table) -> Iterator[pa.Table]:
    for item in batch.to_pylist():
        yield from read(RowFile(**item))


def _prepare(table: pa.Table, plan: DataPlan) -> pa.Table:
    return prepare(table, plan.tokenizer(), plan.sources, plan.rules)
