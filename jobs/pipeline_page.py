"""A turn of the loop as one HTML page for who decides: what changed, for whom, how sure that is, how to undo it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evals.summary import ModelSummary, Paired, Summary
from generate.summary import Summary as Generated
from serve.evaluations import Evaluation
from serve.versions import AliasEntry, VersionId
from sft.html import page_style, page_template
from sft.report import clock

if TYPE_CHECKING:  # its module imports PyTorch
    from sft.trainer import TrainingResult

PAGES = Path(__file__).parent / "pages"
NOTHING = "\u2013"

Change = Literal["better", "worse", "unclear"]


@dataclass(frozen=True)
class Loop:
    """A turn of the loop, as far as it came; what a stage has not found yet is None.

    Rule: `compared` is what the version was compared with, `before` what the alias served before it. `fault` is empty
    where nothing failed. `seconds` are of the stages that ended.
    """

    alias: str
    endpoint: str
    generated: Generated | None = None
    training: TrainingResult | None = None
    data: Mapping[str, Any] | None = None
    version: VersionId | None = None
    before: VersionId | None = None
    compared: str | None = None
    evaluation: Summary | None = None
    evaluated: Path | None = None
    findings: Evaluation | None = None
    entry: AliasEntry | None = None
    fault: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def promoted(self) -> bool:
        """Whether the alias serves the new version."""
        return self.entry is not None and self.entry.version == self.version


@dataclass(frozen=True)
class Line:
    """A suite in the table: both scores, and whether the difference is one."""

    name: str
    description: str
    rows: int
    before: float | None
    after: float | None
    paired: Paired | None
    change: Change


def page(loop: Loop, folder: Path) -> str:
    """Writes a turn of the loop as HTML.

    Args:
        loop: what the stages found.
        folder: where the page will lie; it links to the other reports from there.
    """
    training, evaluated = loop.training, loop.evaluated
    links = {
        "evaluation": evaluated / "report.html" if evaluated else None,
        "run": Path(training.folder.report) if training and "://" not in training.folder.report else None,
    }
    filters = {"percent": _percent, "points": _points, "clock": clock}
    return page_template(PAGES / "pipeline.html", filters).render(
        loop=loop,
        lines=list(_lines(loop)),
        links={name: os.path.relpath(path, folder) for name, path in links.items() if path},
        style=page_style(PAGES / "pipeline.css"),
    )


def change(paired: Paired | None) -> Change:
    """What a difference says: better or worse only where its whole 95% interval does."""
    if paired is None or paired.interval is None:
        return "unclear"
    low, high = paired.interval
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def _lines(loop: Loop) -> Iterator[Line]:
    if loop.evaluation is None or loop.compared is None:
        return
    for name, suite in loop.evaluation.suites.items():
        after = suite.models[str(loop.version)]
        before = suite.models[loop.compared]
        yield Line(name, suite.description, suite.rows, _mean(before), _mean(after), after.paired, change(after.paired))


def _mean(model: ModelSummary) -> float | None:
    return model.score.mean


def _percent(share: float | None) -> str:
    return NOTHING if share is None else f"{100 * share:.0f}%"


def _points(difference: float | None) -> str:
    return NOTHING if difference is None else f"{100 * difference:+.0f}".replace("-", "\u2212")
