"""Which rows a run trains: all of them read once, compared, counted, and shared out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sft.data import DataPlan, Stream, prepare_rows, record_rows
from sft.data_config import DataSection
from sft.duplicates import Duplicates
from sft.holdout import HoldOutReport, prove
from sft.hygiene import Found
from sft.mixture import EpochPlan, Mixture, Share, passes, plan_epoch, shares
from sft.order import FileSize, Queue, reading_order
from sft.survey import Survey, survey


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """What an epoch of a run is made of.

    Rule: `plan` knows what a comparison of all rows found; `shares` say how many rows of each group an epoch holds.
    """

    plan: DataPlan
    survey: Survey
    shares: tuple[Share, ...]
    hold_out: HoldOutReport

    @property
    def examples(self) -> int:
        """Examples of an epoch."""
        return sum(share.target for share in self.shares)

    @property
    def mixed(self) -> bool:
        """Whether an epoch holds other than every kept row once."""
        return any(share.target != share.kept for share in self.shares)


def needs_all_rows(data: DataSection) -> bool:
    """Whether all rows must be read before the first is trained: to compare them, to hold out, or to share out."""
    compared = (data.hygiene.duplicates, data.hygiene.near_duplicates, data.hygiene.contradictions)
    return (
        any(action != "keep" for action in compared)
        or bool(data.hold_out.tasks or data.hold_out.clusters)
        or data.mixture != type(data.mixture)()
        or any(source.cap is not None for source in data.sources)
    )


def select(
    data: DataSection, plan: DataPlan, stream: Stream, quarantine: Callable[[bytes], object] | None = None
) -> Selection:
    """Reads all rows and decides which are trained, and how often.

    Args:
        data: what to train on.
        plan: its files.
        stream: runs a task over all rows.
        quarantine: takes the dropped rows as JSON lines.

    Raises:
        DataError: too many rows are bad, what is held out cannot be kept apart, or the mixture cannot be had.
    """
    plan = compare(plan, stream)
    counted = survey(stream(plan, prepare_rows), quarantine)
    counted.check(data.max_bad_fraction)
    return share_out(data, plan, counted)


def compare(plan: DataPlan, stream: Stream) -> DataPlan:
    """Compares all rows with each other where the hygiene rules ask for it; the plan then knows what was found."""
    if not plan.hygiene.compares:
        return plan
    duplicates = Duplicates(plan.hygiene.near_threshold)
    for table in stream(plan, record_rows):
        duplicates.add(table.column("record").to_pylist())
    return replace(plan, found=Found.of(duplicates.findings()))


def share_out(data: DataSection, plan: DataPlan, counted: Survey) -> Selection:
    """Makes the mixture of rows that were counted.

    Raises:
        DataError: what is held out cannot be kept apart, or the mixture cannot be had.
    """
    counts = counted.census.counts
    report = prove(counts, plan.hold_out)
    return Selection(plan, counted, shares(counts, _mixture(data), plan.hold_out), report)


@dataclass(frozen=True, slots=True, eq=False)
class Epochs:
    """Plans epochs: the order of their files, and how often each row is trained. A function of (seed, epoch) alone.

    Args:
        plan: what to read.
        seed: of the run.
        selection: what an epoch is made of; None where the data was not counted, and every row is trained once.
    """

    plan: DataPlan
    seed: int
    selection: Selection | None

    def order(self, epoch: int) -> tuple[tuple[Queue, ...], ...]:
        """The order in which an epoch reads its files."""
        if self.selection is None:
            sizes = [FileSize(file.source, max(file.size, 1)) for file in self.plan.files]
        else:
            census = self.selection.survey.census
            times = passes(census, self.selection.shares) if self.selection.mixed else {}
            sizes = []
            for file in self.plan.files:
                place = (file.source, file.name)
                counted = census.files.get(place)
                rows, most = (counted.rows, times.get(place, 1)) if counted else (1, 0)
                sizes.append(FileSize(file.source, rows, most))
        return reading_order(sizes, self.seed, epoch)

    def draw(self, epoch: int) -> EpochPlan | None:
        """How often each row of an epoch is trained; None where every kept row is trained once."""
        if self.selection is None or not self.selection.mixed:
            return None
        return plan_epoch(self.selection.survey.census, self.selection.shares, self.seed, epoch)


def _mixture(data: DataSection) -> Mixture:
    section = data.mixture
    return Mixture(
        over=section.over,
        mode=section.mode,
        temperature=section.temperature or 1.0,
        cap=section.cap,
        rows=section.rows,
        weights={source.label: source.weight for source in data.sources if source.weight is not None},
        task_weights=section.weights,
        limits={source.label: source.cap for source in data.sources if source.cap is not None},
    )
