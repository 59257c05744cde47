"""What is done about rows that should not be trained as they are: the rules of a run, and the checks of single rows.

Rows are compared with each other in `duplicates`, with evaluation files in `contamination`; `personal` looks for data
of persons. Nothing here reads files or knows of Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.contamination import Contamination, index_evaluation
from sft.data_config import Action, HygieneSection
from sft.duplicates import REASONS, Findings, row_key
from sft.messages import Conversation, Reason, RowError
from sft.personal import PersonalAction, screen_personal


@dataclass(frozen=True, slots=True)
class HygieneRules:
    """What is looked for and what is done about it; picklable, and the same for every worker.

    Args:
        actions: for each of `duplicates.REASONS`.
        near_threshold: Jaccard similarity of near duplicates; None where they are not looked for.
        contamination: what to do with rows that share text with an evaluation file.
        evaluation: the evaluation files' texts; None where they are not looked for.
        personal_data: what to do about personal data.
    """

    actions: Mapping[Reason, Action]
    near_threshold: float | None
    contamination: Action
    evaluation: Contamination | None
    personal_data: PersonalAction

    @property
    def compares(self) -> bool:
        """Whether rows are compared with each other at all."""
        return any(action != "keep" for action in self.actions.values())

    @property
    def screens(self) -> bool:
        """Whether rows are checked one by one at all."""
        return self.evaluation is not None or self.personal_data != "keep"

    def dropped(self, reasons: Sequence[Reason]) -> Reason | None:
        """The reason for which a row is left out, or None where it stays."""
        return next((reason for reason in reasons if self.actions[reason] == "drop"), None)

    def flags(self, reasons: Sequence[Reason]) -> tuple[str, ...]:
        """What is noted of a row that stays."""
        return tuple(str(reason) for reason in reasons if self.actions[reason] == "flag")


@dataclass(frozen=True, slots=True)
class Screened:
    """A row that passed, redacted where the rules say so, and what was noted of it."""

    conversation: Conversation
    flags: tuple[str, ...]


def plan_hygiene(section: HygieneSection, evaluation: Iterable[tuple[str, Iterable[Conversation]]]) -> HygieneRules:
    """Makes the rules of a run.

    Args:
        section: the configuration.
        evaluation: name and rows of each of its evaluation files; not read where they are not looked for.
    """
    searched = section.evaluation and section.contamination != "keep"
    actions: dict[Reason, Action] = {
        Reason.DUPLICATE: section.duplicates,
        Reason.NEAR_DUPLICATE: section.near_duplicates,
        Reason.CONTRADICTION: section.contradictions,
    }
    return HygieneRules(
        actions=actions,
        near_threshold=section.near_threshold if section.near_duplicates != "keep" else None,
        contamination=section.contamination,
        evaluation=index_evaluation(evaluation, section.ngram) if searched else None,
        personal_data=section.personal_data,
    )


def screen(conversations: Sequence[Conversation], rules: HygieneRules) -> list[Screened | RowError]:
    """Checks rows one by one: first for text of evaluation files, as it was read, then for personal data."""
    files: list[str | None] = [None] * len(conversations)
    if rules.evaluation:
        sides = [(row, side) for row, conversation in enumerate(conversations) for side in conversation.sides]
        found = rules.evaluation.find([side for _, side in sides])
        for (row, _), file in zip(sides, found, strict=True):
            files[row] = files[row] or file
    return [_screen(*pair, rules) for pair in zip(conversations, files, strict=True)]


def _screen(conversation: Conversation, file: str | None, rules: HygieneRules) -> Screened | RowError:
    if file is not None and rules.contamination == "drop":
        return RowError(Reason.CONTAMINATED, "", f"the row shares text with the evaluation file {file}")
    try:
        screened = [screen_personal(side, rules.personal_data) for side in conversation.sides]
    except RowError as error:
        return error
    conversation = conversation.with_sides([side for side, _ in screened])
    kinds = dict.fromkeys(kind for _, found in screened for kind in found)
    noted = [f"{Reason.CONTAMINATED}:{file}"] if file is not None else []
    return Screened(conversation, (*noted, *(f"{Reason.PERSONAL_DATA}:{kind}" for kind in kinds)))


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a comparison of all rows found, by row: 9 bytes each, to be handed to every worker.

    Rule: `keys` are sorted; `bits[i]` are the reasons of the row with `keys[i]`.
    """

    keys: NDArray[np.uint64]
    bits: NDArray[np.uint8]

    @classmethod
    def of(cls, findings: Findings) -> Found:
        """Sorts findings by row."""
        order = np.argsort(findings.keys)
        return cls(findings.keys[order], findings.bits[order])

    def look_up(self, ids: Sequence[str]) -> list[tuple[Reason, ...]]:
        """What was found of each of these rows."""
        if not len(self.keys):
            return [()] * len(ids)
        wanted = np.array([row_key(row_id) for row_id in ids], np.uint64)
        places = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        bits = np.where(self.keys[places] == wanted, self.bits[places], 0).tolist()
        return [tuple(reason for i, reason in enumerate(REASONS) if bit >> i & 1) if bit else () for bit in bits]
