"""An audit in the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.audit import Audit, Packing
from jobs.audit_examples import Piece, ShownExample, visible
from sft.lengths import Lengths
from sft.survey import EXCLUSIONS, Count, place

PLACES_SHOWN = 3
"""Dropped rows shown of each source and reason."""
BARS = 16
BAR_WIDTH = 40
EDGE_PIECES = 150
"""Tokens shown of an example's begin and of its end."""
SPARKS = 16
_BLOCKS = " ▁▂▃▄▅▆▇█"


def print_audit(console: Console, audit: Audit) -> None:
    """Prints an audit: tables first, then dropped rows with their places, then examples."""
    survey = audit.survey
    part = f" (the first {audit.limit:,} rows of each source)" if audit.limit is not None else ""
    console.rule(f"[bold]{visible(audit.name)}[/bold]{part}")
    _print_sources(console, audit)
    if audit.without_rows:
        console.print(f"no rows in {', '.join(map(visible, audit.without_rows))}", style="bold red", markup=False)
    _print_lengths(console, survey.lengths(), audit.max_length)
    _print_mixture(console, audit)
    _print_clusters(console, survey.tasks)
    if survey.total.flags:
        console.print("\nflags: " + ", ".join(f"{n:,} {flag}" for flag, n in survey.total.flags.most_common()))
    _print_dropped(console, audit)
    for example in audit.examples:
        _print_example(console, example.shortened(EDGE_PIECES))
    console.print(f"\ndata fingerprint {survey.fingerprint}", style="dim")


def _print_sources(console: Console, audit: Audit) -> None:
    table = _table("Data by source", ("source",), ("rows", "kept", "faults", "left out", "tokens", "trained"))
    more = _table(
        "Examples by source",
        ("source",),
        ("truncated", "p50", "p90", "p99", "longest", "packing", "lengths"),
    )
    survey = audit.survey
    by_source = survey.lengths_by_source()
    bounds = survey.lengths().bounds(SPARKS)
    lines = [(visible(name), count, by_source[name]) for name, count in survey.sources.items()]
    packed = [audit.packing_by_source[name] for name in survey.sources]
    if len(lines) > 1:
        lines.append(("all", survey.total, survey.lengths()))
        packed.append(audit.packing)
    for (name, count, lengths), packing in zip(lines, packed, strict=True):
        table.add_row(
            name,
            *(f"{n:,}" for n in (count.rows, count.kept, count.faults.total(), count.excluded.total(), count.tokens)),
            f"{count.trained_tokens:,} ({_share(count.trained_tokens, count.tokens)})",
        )
        quantiles = (lengths.p50, lengths.p90, lengths.p99, lengths.longest)
        more.add_row(
            name,
            f"{count.flags['truncated']:,}",
            *(f"{n:,}" for n in quantiles),
            _packed(packing),
            Text(_sparkline(lengths.counts(bounds)), style="green"),
        )
    console.print(table)
    console.print(more)
    packs = audit.packing
    console.print(
        f"packing: {packs.packs:,} packs of {packs.capacity:,} tokens hold {packs.tokens:,}, "
        f"which is {_packed(packs)}; best fit over windows of {audit.shuffle_window:,} examples"
    )


def _print_lengths(console: Console, lengths: Lengths, limit: int) -> None:
    if not lengths.histogram:
        return
    table = _table(f"Tokens of an example (the limit is {limit:,})", (), ("up to", "examples", ""))
    table.columns[-1].justify = "left"
    bounds = lengths.bounds(BARS)
    counts = lengths.counts(bounds)
    most = max(counts)
    for bound, count in zip(bounds, counts, strict=True):
        bar = "█" * round(count / most * BAR_WIDTH) or ("▏" if count else "")
        table.add_row(f"{bound:,}", f"{count:,}", Text(bar, style="green"))
    console.print(table)


def _print_mixture(console: Console, audit: Audit) -> None:
    table = _table("One epoch", ("group",), ("kept", "rows", "of the rows", "of the trained tokens"))
    for share in audit.mixture:
        table.add_row(
            visible(share.group),
            f"{share.kept:,}",
            f"{share.rows:,}",
            f"{share.share:.1%}",
            f"{share.trained_share:.1%}",
        )
    if len(audit.mixture) > 1:
        console.print(table)


def _print_clusters(console: Console, tasks: Mapping[tuple[str, str], Count]) -> None:
    clusters: dict[str, list[Count]] = {}
    for (cluster, task), count in tasks.items():
        if cluster or task:
            clusters.setdefault(cluster, []).append(count)
    table = _table("Clusters of tasks", ("cluster",), ("tasks", "rows", "kept"))
    for cluster, counts in clusters.items():
        rows, kept = sum(count.rows for count in counts), sum(count.kept for count in counts)
        table.add_row(visible(cluster) or "(none)", f"{len(counts):,}", f"{rows:,}", f"{kept:,}")
    if clusters:
        console.print(table)


def _print_dropped(console: Console, audit: Audit) -> None:
    """Prints what was dropped by source and reason, with the first places of each."""
    places: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in audit.survey.refused:
        places.setdefault((row["source"], row["reason"]), []).append(row)
    if places:
        console.print("\nDropped rows", style="bold")
    for source, count in audit.survey.sources.items():
        for reason, number in count.dropped.most_common():
            kind = "left out as asked" if reason in EXCLUSIONS else "fault"
            console.print(f"{number:,} {reason} ({kind}) in {visible(source)}", markup=False)
            for held in places[source, reason][:PLACES_SHOWN]:
                console.print(f"  {visible(place(held))}: {visible(held['message'])}", markup=False, highlight=False)
            if number > PLACES_SHOWN:
                console.print(f"  and {number - PLACES_SHOWN:,} more", style="dim")


def _print_example(console: Console, example: ShownExample) -> None:
    names = [visible(name) for name in (example.id, example.task, example.cluster, *example.flags) if name]
    title = "  ".join([*names, f"{example.tokens:,} tokens, {example.trained_tokens:,} trained"])
    marked = not console.is_terminal or console.no_color
    text = coloured(example.head, marked=marked)
    if example.omitted:
        text.append(f"\n[{example.omitted:,} tokens left out]\n", style="italic")
        text += coloured(example.tail, marked=marked)
    text.rstrip()
    console.print(Text(f"\n{title}", style="bold"))
    console.print(text)


def coloured(pieces: Iterable[Piece], *, marked: bool) -> Text:
    """Trained text in colour, and between ⟦ and ⟧ where there are no colours."""
    text = Text()
    for trained, turn in itertools.groupby(pieces, lambda piece: piece.weight == 1):
        text.append("⟦" if marked and trained else "")
        for style, alike in itertools.groupby(turn, _style):
            text.append(visible("".join(piece.text for piece in alike)), style=style)
        text.append("⟧" if marked and trained else "")
    return text


def _style(piece: Piece) -> str:
    style = "bold green" if piece.weight == 1 else "yellow" if piece.weight else "dim"
    return f"{style} reverse" if piece.special else style


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, pad_edge=False)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _sparkline(counts: Sequence[int]) -> str:
    return "".join(_BLOCKS[-(-8 * count // max(*counts, 1))] for count in counts)


def _packed(packing: Packing) -> str:
    return f"{packing.efficiency:.1%}" if packing.packs else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "-"
