"""An audit as one HTML page, whole in itself: it loads nothing, and all text from the data is escaped."""

from __future__ import annotations

import base64
import hashlib
import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.audit import Audit
from jobs.audit_examples import Piece, visible
from sft.html import page_style, page_template
from sft.lengths import Lengths
from sft.survey import EXCLUSIONS

PAGES = Path(__file__).parent / "pages"
BARS = 28
PLACES_SHOWN = 500
"""Dropped rows on a page, shared out among sources and reasons."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a histogram; `height` is a share of the highest."""

    label: str
    rows: int
    height: float


@dataclass(frozen=True, slots=True)
class Marker:
    """A line across a histogram; `place` is a share of its width."""

    label: str
    place: float


@dataclass(frozen=True, slots=True)
class Dropped:
    """Rows of one source that were dropped for one reason, with the first places."""

    source: str
    reason: str
    count: int
    asked: bool
    places: tuple[Mapping[str, Any], ...]


def page(audit: Audit) -> str:
    """Writes an audit as HTML."""
    template = page_template(PAGES / "audit.html", {"percent": _percent, "visible": visible, "about": _about})
    script = (PAGES / "audit.js").read_text(encoding="utf-8")
    survey = audit.survey
    lengths = survey.lengths()
    by_source = survey.lengths_by_source()
    bounds = lengths.bounds(BARS)
    return template.render(
        audit=audit,
        total=survey.total,
        lengths=lengths,
        by_source=by_source,
        bars=_bars(lengths, bounds),
        source_bars={name: _bars(of_source, bounds) for name, of_source in by_source.items()},
        markers=_markers(lengths, bounds, audit.max_length),
        dropped=_dropped(audit),
        exclusions=EXCLUSIONS,
        clusters=_clusters(audit),
        style=page_style(PAGES / "audit.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _about(piece: Piece) -> str:
    """A tooltip: a piece's ids and labels."""
    several = len(piece.ids) > 1
    ids, labels = (" ".join(map(str, numbers)) for numbers in (piece.ids, piece.labels))
    weight = f", weight {piece.weight:g}" if 0 < piece.weight < 1 else ""
    return f"ids {ids}, labels {labels}{weight}" if several else f"id {ids}, label {labels}{weight}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share in (0, 1) or 0.1 <= share < 0.995 else f"{share:.1%}"


def _bars(lengths: Lengths, bounds: list[int]) -> list[Bar]:
    counts = lengths.counts(bounds)
    most = max(counts, default=0) or 1
    return [Bar(_short(bound), count, count / most) for bound, count in zip(bounds, counts, strict=True)]


def _markers(lengths: Lengths, bounds: list[int], limit: int) -> list[Marker]:
    named = {"p50": lengths.p50, "p90": lengths.p90, "p99": lengths.p99, "limit": limit}
    inside = {name: value for name, value in named.items() if bounds and value <= bounds[-1]}
    return [Marker(f"{name} {value:,}", _place(value, bounds)) for name, value in inside.items()]


def _place(length: int, bounds: list[int]) -> float:
    """Where a length lies on an axis on which all buckets are equally wide."""
    index = bisect_left(bounds, length)
    bound = bounds[index]
    below = bounds[index - 1] if index else bound / (bounds[1] / bound if len(bounds) > 1 else 2)
    within = math.log(max(length, below) / below) / math.log(bound / below)
    return (index + within) / len(bounds)


def _short(bound: int) -> str:
    """A bucket's bound in few characters; k is 1,024."""
    return f"{bound / 1024:g}k" if bound >= 1024 else str(bound)


def _dropped(audit: Audit) -> list[Dropped]:
    held: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in audit.survey.refused:
        held.setdefault((row["source"], row["reason"]), []).append(row)
    each = max(1, min(20, PLACES_SHOWN // max(1, len(held))))
    found = [
        Dropped(source, reason, number, reason in EXCLUSIONS, tuple(held[source, reason][:each]))
        for source, count in audit.survey.sources.items()
        for reason, number in count.dropped.items()
    ]
    return sorted(found, key=lambda group: (group.asked, -group.count))


def _clusters(audit: Audit) -> list[dict[str, Any]]:
    clusters: dict[str, dict[str, Any]] = {}
    for (cluster, task), count in audit.survey.tasks.items():
        if cluster or task:
            found = clusters.setdefault(cluster, {"name": cluster, "rows": 0, "kept": 0, "tasks": []})
            found["rows"] += count.rows
            found["kept"] += count.kept
            found["tasks"].append((task, count))
    return list(clusters.values())
