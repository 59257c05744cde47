"""`python -m jobs.inspect_data --config FILE`: what a data set will train, without Ray and without an accelerator."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console

from jobs import cli
from jobs.audit import Audit, mixture, packing, packing_by_source, proofs
from jobs.audit_examples import MOST_SHOWN, ExamplePicker, dump, shown
from jobs.audit_page import page
from jobs.audit_text import print_audit
from sft import storage
from sft.base import BaseTokenizer, locate, read_template
from sft.config import TrainConfig
from sft.data import DataPlan, Task, first_rows, here, plan_data, prepare_rows
from sft.errors import DataError, StorageError
from sft.messages import Reason
from sft.selection import Selection, compare, share_out
from sft.survey import Survey, quarantine_lines

DESCRIPTION = """Show what a training config would train on: rows by source, dropped rows by reason, tokens, lengths,
packing, the mixture, and examples with the trained text in colour. Reads a training config; starts no Ray.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the audit; exit code 1 where the training run would refuse the data."""
    made = _parser()
    arguments, config = cli.configure(made, TrainConfig, argv)
    if arguments.json and arguments.dump and not arguments.out:
        made.error("--json and --dump would both write to stdout: name a file for the dump with --out FILE")
    base = locate(config.model.base)
    template = read_template(config.model.chat_template)
    plan = plan_data(config.data, base, template, config.evaluate.share, pairs=config.on_pairs)
    tokenizer = plan.tokenizer()
    if arguments.limit is None:
        plan = compare(plan, _everything)
    limit = arguments.limit
    tables = _everything(plan, prepare_rows) if limit is None else first_rows(plan, limit)
    counted = Survey()
    picker = ExamplePicker(arguments.show)
    with contextlib.ExitStack() as stack:
        quarantine = stack.enter_context(_open(arguments.quarantine)) if arguments.quarantine else None
        dumped = stack.enter_context(_open(arguments.out)) if arguments.out else sys.stdout.buffer
        left = arguments.dump
        for table in _watched(tables, counted):
            picker.add(table)
            if left:
                left -= _dump(table, left, tokenizer, dumped)
            if quarantine:
                quarantine.write(quarantine_lines(table))
    selection, fault = _selection(config, plan, counted)
    audit = _audit(config, tokenizer, plan, counted, picker, arguments.limit, selection)
    if arguments.html:
        storage.write(str(arguments.html), page(audit).encode())
    if arguments.json:
        print(json.dumps(audit.to_dict(), indent=1))
    elif arguments.out or not arguments.dump:
        print_audit(Console(soft_wrap=True), audit)
    counted.check(config.data.max_bad_fraction)
    if fault is not None:
        raise fault
    dropped = counted.dropped.total() - counted.dropped[Reason.HELD_OUT]
    if arguments.strict and dropped:
        raise DataError(f"{dropped} of {counted.rows} rows were dropped, and --strict allows none")
    return 0


def _parser() -> argparse.ArgumentParser:
    made = cli.parser("inspect_data", DESCRIPTION)
    most = f"examples to show of each source, {MOST_SHOWN} at most in all (default: 2)"
    made.add_argument("--show", metavar="N", type=_number, default=2, help=most)
    made.add_argument("--limit", metavar="N", type=_number, help="look at the first N rows of each source alone")
    made.add_argument("--html", metavar="FILE", type=Path, help="write the same as a page that a browser opens")
    made.add_argument("--json", action="store_true", help="print the numbers as JSON and nothing else")
    made.add_argument("--quarantine", metavar="FILE", type=Path, help="write each dropped row's place and reason")
    made.add_argument("--dump", metavar="N", type=_number, default=0, help="write the first N examples as JSON lines")
    made.add_argument("--out", metavar="FILE", type=Path, help="file for --dump; stdout, and nothing else, by default")
    made.add_argument("--strict", action="store_true", help="fail when any row was dropped, held-out rows apart")
    return made


def _number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def _everything(plan: DataPlan, task: Task) -> Iterator[pa.Table]:
    return here(plan, task, len(os.sched_getaffinity(0)))


def _watched(tables: Iterable[pa.Table], counted: Survey) -> Iterator[pa.Table]:
    """Counts tables as they pass by, and says on a terminal's stderr how far it is."""
    begin = time.perf_counter()
    rows = 0
    with Console(stderr=True).status("reading") as status:
        for table in tables:
            counted.add(table)
            rows += table.num_rows
            status.update(f"{rows:,} rows read, {rows / (time.perf_counter() - begin):,.0f} a second")
            yield table


def _dump(table: pa.Table, most: int, base: BaseTokenizer, out: IO[bytes]) -> int:
    rows = table.filter(pc.equal(table.column("reason"), "")).slice(0, most).to_pylist()
    for row in rows:
        out.write(json.dumps(dump(row, base), ensure_ascii=False).encode() + b"\n")
    out.flush()
    return len(rows)


def _open(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("wb")
    except OSError as error:
        raise StorageError(f"{path}: cannot be written ({error})") from None


def _selection(config: TrainConfig, plan: DataPlan, counted: Survey) -> tuple[Selection | None, DataError | None]:
    """The mixture of an epoch, or why there is none; what was counted is shown all the same."""
    try:
        return share_out(config.data, plan, counted), None
    except DataError as error:
        return None, error


def _audit(
    config: TrainConfig,
    base: BaseTokenizer,
    plan: DataPlan,
    counted: Survey,
    picker: ExamplePicker,
    limit: int | None,
    selection: Selection | None,
) -> Audit:
    data = config.data
    sources = counted.sources
    room = data.max_length * (2 if config.on_pairs else 1)  # the limit holds for each text of a pair
    return Audit(
        name=config.name,
        base_model=config.model.id,
        template=base.template.fingerprint,
        proofs=proofs(base, data.mask.history),
        max_length=data.max_length,
        max_bad_fraction=data.max_bad_fraction,
        shuffle_window=data.shuffle_window,
        limit=limit,
        without_rows=tuple(name for name in plan.sources if name not in sources),
        survey=counted,
        packing=packing(counted.kept_rows.lengths, data.shuffle_window, room),
        packing_by_source=packing_by_source(counted, data.shuffle_window, room),
        mixture=mixture(
            counted,
            [(str(share.group), share.cells, share.target) for share in selection.shares] if selection else None,
        ),
        examples=tuple(shown(row, base) for row in picker.rows),
    )


if __name__ == "__main__":
    cli.run(main)
