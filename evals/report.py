"""An evaluation as one HTML page, whole in itself: it loads nothing, and all text that is not ours is escaped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Template

from evals.gate import Verdict
from evals.scoring import Scored
from evals.suite import Row, Suite
from evals.summary import Paired, Summary
from sft.html import page_style, page_template

PAGES = Path(__file__).parent / "pages"
NOTHING = "\u2013"
ROWS_SHOWN = 100
"""Rows with both answers, of each suite, model and direction."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A row whose score rose or fell, with both answers."""

    row: Row
    before: Scored
    after: Scored

    @property
    def prompt(self) -> str:
        """What the user said last."""
        return self.row.messages[-1]["content"]


@dataclass(frozen=True)
class Comparison:
    """A model against the baseline, on the same suite or across two; `rows` are the first of those that changed."""

    model: str
    paired: Paired
    better: tuple[Changed, ...]
    worse: tuple[Changed, ...]


def page(summary: Summary, suites: Sequence[Suite], scored: Iterable[Scored], verdicts: Sequence[Verdict] = ()) -> str:
    """Writes an evaluation as HTML.

    Args:
        summary: its numbers.
        suites: what was asked.
        scored: every answer.
        verdicts: what the gate said of the models, where there was one.
    """
    first: dict[tuple[str, str, str], Scored] = {}
    for one in scored:
        first.setdefault((one.suite, one.model, one.row), one)
    cells = [one for suite in summary.suites.values() for one in suite.models.values()]
    return template("report.html").render(
        summary=summary,
        asked=sum(one.asked for one in cells),
        scored=sum(one.scored for one in cells),
        tokens=sum(one.prompt_tokens + one.completion_tokens for one in cells),
        comparisons={suite.name: list(_comparisons(summary, suite, first)) for suite in suites},
        verdicts=verdicts,
        rows_shown=ROWS_SHOWN,
        style=style(),
    )


def template(name: str) -> Template:
    """A page's template, which escapes all text and knows the filters for numbers."""
    filters: dict[str, Callable[..., str]] = {
        "percent": _percent,
        "points": _points,
        "chance": _chance,
        "place": _place,
    }
    return page_template(PAGES / name, filters)


def style() -> str:
    """The style of all pages."""
    return page_style(PAGES / "report.css")


def _comparisons(summary: Summary, suite: Suite, first: Mapping[tuple[str, str, str], Scored]) -> Iterator[Comparison]:
    for model, numbers in summary.suites[suite.name].models.items():
        for paired in filter(None, (numbers.paired, numbers.across)):
            before = {row.id: first.get((paired.suite, paired.model, row.id)) for row in suite.rows}
            changed = {
                row.id: Changed(row, there, first[suite.name, model, row.id])
                for row in suite.rows
                if (there := before[row.id]) is not None
            }
            better, worse = (tuple(changed[row] for row in ids[:ROWS_SHOWN]) for ids in (paired.better, paired.worse))
            yield Comparison(model, paired, better, worse)


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.1f}%"


def _points(difference: float | None) -> str:
    """A difference of shares, in percentage points, with a true minus."""
    return NOTHING if difference is None else f"{100 * difference:+.1f}".replace("-", "\u2212")


def _chance(p: float | None) -> str:
    return NOTHING if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _place(value: float, low: float = 0.0) -> str:
    """Where a value from `low` to 1 lies on an axis of 100 units."""
    return f"{100 * (value - low) / (1 - low):.2f}"
