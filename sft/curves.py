"""Numbers by step -> curves for a page: thinned, with round ticks, as SVG paths. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

Point = tuple[float, float | None]
"""A step and its value; None where it has none."""

WIDTH, HEIGHT = 1000, 300
"""Size of a plot's coordinates; the page stretches them."""
BUCKETS = 120
"""Points of a curve; of more steps, some share one."""
TICKS = 4
SMALLEST = 1e-290
"""Values that differ by less are one; below, a quotient of theirs would be no number any more."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One line of a plot.

    Rule: `line` and `band` are SVG paths in a plot's coordinates; the line goes through the means of neighbouring
    steps, the band from their lowest to their highest value and is empty where no steps were joined. `dots` are the
    places of single values, for curves that have few.
    """

    name: str
    line: str
    band: str
    dots: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A mark on an axis; `place` is a share of its length, from the left or from the bottom."""

    place: float
    label: str


@dataclass(frozen=True, slots=True)
class Readout:
    """What a stretch of a plot says under the pointer; `left` and `width` in a plot's coordinates."""

    left: float
    width: float
    text: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over the same steps."""

    title: str
    about: str
    curves: tuple[Curve, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    readouts: tuple[Readout, ...]


def plot(
    title: str,
    about: str,
    series: Sequence[tuple[str, Sequence[Point]]],
    *,
    steps: float,
    dotted: Sequence[str] = (),
    from_zero: bool = False,
) -> Plot | None:
    """Draws series over the steps of a run; None where no value is to be drawn.

    Args:
        title: of the plot.
        about: what its values are, and in which unit.
        series: names and points, in the order of their steps.
        steps: the last step of the x axis.
        dotted: series whose single values are marked.
        from_zero: whether the y axis begins at 0; no value is below it.
    """
    thinned = [(name, _buckets(points)) for name, points in series]
    drawn = [(name, buckets) for name, buckets in thinned if buckets]
    if not drawn:
        return None
    lows = [bucket.low for _, buckets in drawn for bucket in buckets]
    highs = [bucket.high for _, buckets in drawn for bucket in buckets]
    rows = round_ticks(0.0, max(highs) or 1.0) if from_zero else round_ticks(min(lows), max(highs))
    columns = [tick for tick in round_ticks(0.0, max(steps, 1.0)) if tick <= steps and tick == int(tick)]
    low, high = rows[0], rows[-1]

    def x(step: float) -> float:
        return WIDTH * step / max(steps, 1.0)

    def y(value: float) -> float:
        return HEIGHT * (1 - (value - low) / (high - low))

    return Plot(
        title=title,
        about=about,
        curves=tuple(
            Curve(
                name,
                _path((x(b.step), y(b.mean)) for b in buckets),
                _band([(x(b.step), y(b.high), y(b.low)) for b in buckets])
                if any(b.high > b.low for b in buckets)
                else "",
                tuple((x(b.step), y(b.mean)) for b in buckets) if name in dotted or len(buckets) == 1 else (),
                short(buckets[-1].mean),
            )
            for name, buckets in drawn
        ),
        rows=tuple(Tick((tick - low) / (high - low), short(tick)) for tick in rows),
        columns=tuple(Tick(tick / max(steps, 1.0), f"{tick:,.0f}") for tick in columns),
        readouts=_readouts(drawn, x),
    )


def round_ticks(low: float, high: float) -> list[float]:
    """Round numbers in equal steps, from at most `low` to at least `high`; at least two."""
    size = max(abs(low), abs(high))
    if high - low <= max(1e-9 * size, SMALLEST):
        half = (abs(low) if size > SMALLEST else 1.0) / 2
        low, high = low - half, low + half
    rough = (high - low) / TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def short(value: float) -> str:
    """A number in few characters."""
    for size, mark in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if mark == 'k' else size):.4g}{mark}"
    return f"{value:.4g}"


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Neighbouring steps as one."""

    step: float
    first: float
    last: float
    mean: float
    low: float
    high: float


def _buckets(points: Sequence[Point]) -> list[_Bucket]:
    """Joins neighbouring points to at most BUCKETS; points without a finite value are left out."""
    held = [(step, value) for step, value in points if value is not None and math.isfinite(value)]
    size = max(1, -(-len(held) // BUCKETS))
    made = []
    for start in range(0, len(held), size):
        part = held[start : start + size]
        values = [value for _, value in part]
        mean = sum(values) / len(values)
        made.append(_Bucket((part[0][0] + part[-1][0]) / 2, part[0][0], part[-1][0], mean, min(values), max(values)))
    return made


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _band(edges: Sequence[tuple[float, float, float]]) -> str:
    upper = [(x, top) for x, top, _ in edges]
    lower = [(x, bottom) for x, _, bottom in reversed(edges)]
    return _path([*upper, *lower]) + "Z"


def _readouts(drawn: Sequence[tuple[str, Sequence[_Bucket]]], x: Callable[[float], float]) -> tuple[Readout, ...]:
    """Stretches around the points of the series that has most; a value of another series stands at its own step."""
    main = max((buckets for _, buckets in drawn), key=len)
    edges = [0.0, *((a.step + b.step) / 2 for a, b in itertools.pairwise(main)), main[-1].last]
    made = []
    for bucket, left, right in zip(main, edges[:-1], edges[1:], strict=True):
        where = f"step {bucket.first:,.0f}" + (f" to {bucket.last:,.0f}" if bucket.last > bucket.first else "")
        said = [
            f"{name} {short(other.mean)}"
            for name, buckets in drawn
            for other in buckets
            if other.last >= bucket.first and other.first <= bucket.last
        ]
        made.append(Readout(x(left), max(x(right) - x(left), 4.0), f"{where}: {', '.join(said)}"))
    return tuple(made)
