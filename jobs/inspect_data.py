"""`python -m jobs.inspect_data --config FILE`: what a data set will train, without Ray and without an accelerator."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import cli
from sft.base import BaseTokenizer, load_tokenizer, locate
from sft.config import TrainConfig
from sft.data import plan_data, stream_here
from sft.errors import DataError
from sft.mask import UNTRAINED, Example
from sft.rows import examples
from sft.survey import Survey

DESCRIPTION = """Show what a training config would train on: rows by source, refused rows by reason, tokens, and
examples with the trained text in colour. Reads a training config; starts no Ray.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the survey; exit code 1 where the training run would refuse the data."""
    made = cli.parser("inspect_data", DESCRIPTION)
    made.add_argument("--show", metavar="N", type=int, default=2, help="examples to show (default: 2)")
    made.add_argument("--json", action="store_true", help="print the numbers as JSON and nothing else")
    made.add_argument("--strict", action="store_true", help="fail when any row was refused")
    arguments, config = cli.configure(made, TrainConfig, argv)
    base = locate(config.model.base)
    tokenizer = load_tokenizer(base.absolute())
    plan = plan_data(config.data, base)
    counted = Survey()
    shown: list[Example] = []
    for table in _counted(stream_here(plan), counted):
        if len(shown) < arguments.show:
            shown += examples(table)[: arguments.show - len(shown)]
    if arguments.json:
        print(json.dumps(counted.to_dict(), indent=1))
    else:
        _print(Console(soft_wrap=True), counted, shown, tokenizer)
    counted.check(config.data.max_bad_fraction)
    if arguments.strict and counted.refused:
        raise DataError(f"{len(counted.refused)} of {counted.rows} rows were refused, and --strict allows none")
    return 0


def coloured(example: Example, tokenizer: BaseTokenizer) -> Text:
    """An example's text with its trained tokens in colour."""
    text = Text()
    trained = example.labels != UNTRAINED
    edges = [0, *(i for i in range(1, len(trained)) if trained[i] != trained[i - 1]), len(trained)]
    for begin, end in itertools.pairwise(edges):
        piece = tokenizer.tokenizer.decode(example.input_ids[begin:end].tolist())
        text.append(str(piece), style="bold green" if trained[begin] else "dim")
    return text


def _counted(tables: Iterable[pa.Table], counted: Survey) -> Iterator[pa.Table]:
    for table in tables:
        counted.add(table)
        yield table


def _print(console: Console, counted: Survey, shown: Sequence[Example], tokenizer: BaseTokenizer) -> None:
    table = Table(title="Data by source")
    for column in ("source", "rows", "kept", "refused", "tokens", "trained", "longest"):
        table.add_column(column, justify="left" if column == "source" else "right")
    for name, count in counted.sources.items():
        share = f"{count.trained_tokens / count.tokens:.0%}" if count.tokens else "-"
        numbers = (count.rows, count.kept, count.rows - count.kept, count.tokens)
        table.add_row(name, *(f"{n:,}" for n in numbers), f"{count.trained_tokens:,} ({share})", f"{count.longest:,}")
    console.print(table)
    if counted.refused:
        console.print("[bold]Refused rows[/bold] (place, reason, field: message)")
        for row in counted.refused[:20]:
            where = f"{Path(row['source']).name}/{row['file']}:{row['position']}"
            console.print(f"  {where}  {row['reason']}  {row['field'] or 'row'}: {row['message']}", markup=False)
        if len(counted.refused) > 20:
            console.print(f"  and {len(counted.refused) - 20:,} more")
    for example in shown:
        console.rule(f"{example.id}   {len(example.input_ids)} tokens, [bold green]{example.trained_tokens} trained")
        console.print(coloured(example, tokenizer))
    console.print(f"data fingerprint {counted.fingerprint}", style="dim")


if __name__ == "__main__":
    cli.run(main)
