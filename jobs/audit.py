"""What a training config would train on: the numbers and examples that the terminal and the page show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.audit_examples import ShownExample
from sft.base import BaseTokenizer
from sft.census import Cell
from sft.pack import best_fit
from sft.survey import Survey
from sft.template import History


@dataclass(frozen=True, slots=True)
class Packing:
    """How full packs of `capacity` tokens are; `efficiency` is the share of their room that holds tokens."""

    packs: int
    tokens: int
    capacity: int
    efficiency: float

    def to_dict(self) -> dict[str, Any]:
        """The packing as plain values, for JSON."""
        return {"packs": self.packs, "capacity": self.capacity, "efficiency": round(self.efficiency, 4)}


@dataclass(frozen=True, slots=True)
class MixtureShare:
    """One group of the mixture: the rows that it has, and those that one epoch takes of it.

    Rule: `share` is of the epoch's rows, `trained_share` of its trained tokens.
    """

    group: str
    kept: int
    rows: int
    share: float
    trained_share: float

    def to_dict(self) -> dict[str, Any]:
        """The share as plain values, for JSON."""
        return {
            "group": self.group,
            "kept": self.kept,
            "rows_per_epoch": self.rows,
            "share": round(self.share, 4),
            "trained_share": round(self.trained_share, 4),
        }


@dataclass(frozen=True)
class Audit:
    """All that is shown of a data set.

    Rule: `limit` is how many rows of each source were looked at, None for all; `without_rows` are sources that gave
    none; `template` is the fingerprint of the chat template.
    """

    name: str
    base_model: str
    template: str
    proofs: tuple[tuple[str, str], ...]
    max_length: int
    max_bad_fraction: float
    shuffle_window: int
    limit: int | None
    without_rows: tuple[str, ...]
    survey: Survey
    packing: Packing
    packing_by_source: Mapping[str, Packing]
    mixture: tuple[MixtureShare, ...]
    examples: tuple[ShownExample, ...]

    @property
    def refusal(self) -> str | None:
        """Why a training run would refuse this data; None where it would not."""
        total = self.survey.total
        if not total.rows:
            return "The data holds no rows."
        if not total.kept:
            return "Nothing is left to train on."
        faults = total.faults.total()
        if faults <= self.max_bad_fraction * total.rows:
            return None
        return (
            f"{faults:,} of {total.rows:,} rows ({faults / total.rows:.1%}) cannot be used; "
            f"the limit is {self.max_bad_fraction:.1%} (data.max_bad_fraction)."
        )

    def to_dict(self) -> dict[str, Any]:
        """The numbers as plain values, for JSON."""
        numbers = self.survey.to_dict()
        for name, source in numbers["sources"].items():
            source["packing"] = self.packing_by_source[name].to_dict()
        return {
            "name": self.name,
            **numbers,
            "packing": self.packing.to_dict(),
            "mixture": [share.to_dict() for share in self.mixture],
        }


def packing(lengths: npt.NDArray[np.int32], window: int, capacity: int) -> Packing:
    """Packs lengths, in tokens, window by window as training does."""
    packs = sum(len(best_fit(lengths[i : i + window].tolist(), capacity)) for i in range(0, len(lengths), window))
    tokens = int(lengths.sum())
    return Packing(packs, tokens, capacity, tokens / max(packs * capacity, 1))


def packing_by_source(survey: Survey, window: int, capacity: int) -> dict[str, Packing]:
    """How well each source packs, if it is packed alone."""
    if not survey.cells:
        return {}
    kept = survey.kept_rows
    numbers = {name: number for number, name in enumerate(survey.sources)}
    source_of = np.asarray([numbers[origin.source] for origin in kept.origins], np.int32)[kept.of]
    order = np.argsort(source_of, kind="stable")
    parts = np.split(kept.lengths[order], np.searchsorted(source_of[order], np.arange(1, len(numbers))))
    return {name: packing(part, window, capacity) for name, part in zip(numbers, parts, strict=True)}


def mixture(
    survey: Survey, groups: Iterable[tuple[str, Sequence[tuple[str, str, str]], int]] | None = None
) -> tuple[MixtureShare, ...]:
    """The mixture of an epoch.

    Args:
        survey: what there is.
        groups: what has a share: its name, its cells (source, task, cluster), and how many rows of it an epoch takes.
            By default each source, and every kept row of it once.
    """
    if groups is None:
        sources = survey.sources.items()
        groups = [(name, [cell for cell in survey.cells if cell.source == name], of.kept) for name, of in sources]
    found = []
    for name, cells, rows in groups:
        counts = [survey.cells[Cell(*cell)] for cell in cells]
        kept = sum(count.kept for count in counts)
        trained = rows * sum(count.trained_tokens for count in counts) / max(kept, 1)
        found.append((name, kept, rows, trained))
    all_rows = sum(rows for _, _, rows, _ in found) or 1
    all_trained = sum(trained for *_, trained in found) or 1
    return tuple(
        MixtureShare(name, kept, rows, rows / all_rows, trained / all_trained) for name, kept, rows, trained in found
    )


def proofs(base: BaseTokenizer, history: History) -> tuple[tuple[str, str], ...]:
    """What is proven of the chat template when it is loaded: a name and a sentence each."""
    stop = " or ".join(base.template.stop_tokens)
    whole = "Each turn's prompt, as a server builds it, begins the text of the whole conversation."
    split = "Each turn's prompt, as a server builds it, begins its text; turns that are rewritten later are split off."
    marks = "The template marks" if base.template.has_generation_markers else "The template does not mark"
    return (
        ("Prompts as served", split if history == "split" else whole),
        ("Generation markers", f"{marks} generated text; spans are found, and proven, without."),
        ("Stop token trained", f"Every trained turn ends with {stop}, and it carries a label."),
        ("One BOS", "No text begins twice."),
        ("No clock", "Rendered under two clocks, the text is the same."),
    )
