"""What `python -m jobs.adapters` prints for people: tables and lines, made of records only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from serve.evaluations import Evaluation
from serve.registry import Contents
from serve.version_store import Unfinished
from serve.versions import AliasEntry, AliasState, Retirement, Version, VersionId
from sft.adapter import Bundle

SHORT = 12
"""Digits of a fingerprint that people compare by eye; `--json` has them all."""
NOTHING = "-"


@dataclass(frozen=True)
class Rows:
    """A table: rows of as many cells as there are headings."""

    headings: tuple[str, ...]
    rows: list[list[str]]

    def table(self) -> Table:
        """For a terminal, whose width it fits."""
        table = Table(*self.headings, box=None, pad_edge=False, header_style="bold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def text(self) -> str:
        """For a file or a program: a line a row, nothing cut or wrapped."""
        lines = [list(self.headings), *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


def version_table(versions: Sequence[Version], contents: Contents) -> Rows:
    """One line a version, with what it serves."""
    serving: dict[VersionId, list[str]] = {}
    for alias, entry in contents.aliases.items():
        for version, part in entry.parts().items():
            serving.setdefault(version, []).append(alias if part == "stable version" else f"{alias} ({part})")
    rows = [
        [
            str(version.id),
            "retired" if version.id in contents.retired else ", ".join(serving.get(version.id, [])),
            version.bundle.base_model,
            str(version.bundle.rank),
            size_text(sum(file.size for file in version.bundle.files.values())),
            when(version.published_at),
            version.published_by,
        ]
        for version in versions
    ]
    return _rows(("VERSION", "ALIASES", "BASE", "RANK", "SIZE", "PUBLISHED", "BY"), rows)


def alias_table(aliases: Mapping[str, AliasEntry]) -> Rows:
    """One line an alias, with all that it serves."""
    rows = [
        [alias, str(entry.version), *_parts(entry), str(entry.number), when(entry.at), entry.by]
        for alias, entry in aliases.items()
    ]
    return _rows(("ALIAS", "SERVES", "CANARY", "SHADOW", "ENTRY", "SINCE", "BY"), rows)


def history_table(entries: Iterable[AliasEntry]) -> Rows:
    """One line an entry, with the whole state after it."""
    rows = [
        [
            str(entry.number),
            entry.action,
            str(entry.version),
            *_parts(entry),
            when(entry.at),
            f"evaluation {entry.evaluation}" if entry.evaluation else NOTHING,
            entry.by,
            entry.reason,
        ]
        for entry in entries
    ]
    return _rows(("ENTRY", "ACTION", "SERVES", "CANARY", "SHADOW", "AT", "GATE", "BY", "REASON"), rows)


def unfinished_table(uploads: Iterable[Unfinished]) -> Rows:
    """One line an unfinished upload."""
    rows = [
        [str(upload.id), str(len(upload.files)), size_text(upload.size), when(upload.modified)] for upload in uploads
    ]
    return _rows(("UPLOAD", "FILES", "SIZE", "LAST TOUCHED"), rows)


def version_text(
    version: Version,
    naming: Mapping[str, AliasEntry],
    retirement: Retirement | None,
    evaluations: Sequence[Evaluation] = (),
) -> str:
    """All that is known of one version."""
    bundle = version.bundle
    served = [f"{alias} ({entry.parts()[version.id]}, entry {entry.number})" for alias, entry in naming.items()]
    facts = {
        "published": f"{when(version.published_at)} by {version.published_by}",
        "aliases": ", ".join(served) or "none",
        "retired": _signed(retirement) if retirement else "no",
        "base": f"{bundle.base_model} ({bundle.base_fingerprint[:SHORT]})",
        "template": bundle.template_fingerprint[:SHORT],
        "adapter": f"rank {bundle.rank} on {', '.join(bundle.target_modules)}",
        "manifest": version.digest[:SHORT],
    }
    lines = [str(version.id), *(f"  {name:<10} {_plain(value)}" for name, value in facts.items()), "  files"]
    width = max(map(len, bundle.files))
    lines += [
        f"    {name:<{width}}  {size_text(file.size):>9}  {file.sha256[:SHORT]}" for name, file in bundle.files.items()
    ]
    # A run's own order: what it was, what came out, what went in, and how.
    known = [key for key in ("run", "data_fingerprint", "metrics", "data", "config") if key in bundle.lineage]
    lines.append("  lineage")
    for key in (*known, *sorted(bundle.lineage.keys() - set(known))):
        text = yaml.safe_dump({key: bundle.lineage[key]}, sort_keys=False, allow_unicode=True, width=100)
        lines += [f"    {_plain(line)}" for line in text.splitlines()]
    if evaluations:
        lines.append("  evaluations")
        lines += [f"    {_plain(line)}" for one in evaluations for line in evaluation_lines(one)]
    return "\n".join(lines)


def evaluation_lines(one: Evaluation) -> Iterator[str]:
    """An evaluation in a line, and another one for each suite."""
    what = "passed" if one.passed else "failed"
    yield f"{one.number}: {what} gate {one.gate[:SHORT]} against {one.baseline}, {when(one.at)} by {one.by}"
    for name, suite in one.suites.items():
        yield (
            f"   {name}: {_share(suite.version.mean)} of {suite.version.rows} rows, "
            f"{one.baseline} {_share(suite.baseline.mean)}"
        )


def moved_text(done: Mapping[str, Any]) -> str:
    """What a server did to an alias, from its answer; raises KeyError or ValidationError where that is none."""
    entry = AliasEntry.model_validate(done["entry"])
    before = AliasEntry.model_validate(done["before"]) if done["before"] else None
    return f"{moved(entry, before)}\n{swap_text(done['replicas'], done['seconds'])}"


def moved(entry: AliasEntry, before: AliasEntry | None) -> str:
    """What a command did to an alias, in one or two lines."""
    if before is not None and before.number == entry.number:
        return f"{entry.alias} serves {_state(entry)} already; nothing changed"
    line = f"{entry.alias} serves {_state(entry)} since entry {entry.number}, {entry.action}"
    return f"{line}\nbefore: {_state(before)}, entry {before.number}" if before else line


def swap_text(replicas: int | None, seconds: Mapping[str, float]) -> str:
    """How long a running server took for a move."""
    held = "" if replicas is None else f"{replicas} replicas hold it after {seconds['prepare']:.2f} s; "
    return f"{held}served {seconds['flip']:.2f} s later" if held else f"served after {seconds['flip']:.2f} s"


def described(bundle: Bundle) -> str:
    """A bundle in a few words."""
    return f"rank {bundle.rank} on {len(bundle.target_modules)} kinds of modules of {bundle.base_model}"


def when(moment: datetime) -> str:
    """A moment, to the second, in UTC."""
    return f"{moment:%Y-%m-%d %H:%M:%SZ}"


def size_text(size: int) -> str:
    """A number of bytes as people read it."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def _share(mean: float | None) -> str:
    return "no score" if mean is None else f"{mean:.1%}"


def _state(state: AliasState) -> str:
    names = ("canary", "shadow")
    extra = [f"{name} {part}" for name, part in zip(names, _parts(state), strict=True) if part != NOTHING]
    return f"{state.version} ({', '.join(extra)})" if extra else str(state.version)


def _parts(state: AliasState) -> tuple[str, str]:
    canary = f"{state.canary.version} {state.canary.weight * 100:g} %" if state.canary else NOTHING
    shadow = f"{state.shadow.version} {state.shadow.share * 100:g} %" if state.shadow else NOTHING
    return canary, shadow


def _signed(record: Retirement) -> str:
    return f"{when(record.at)} by {record.by}" + (f": {record.reason}" if record.reason else "")


def _rows(headings: tuple[str, ...], rows: Iterable[Sequence[str]]) -> Rows:
    return Rows(headings, [[_plain(cell) for cell in row] for row in rows])


def _plain(text: Any) -> str:
    """A text without what could move a terminal's cursor: names and reasons are anyone's."""
    return "".join(mark if mark.isprintable() else "?" for mark in str(text))
