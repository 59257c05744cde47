"""What is done about rows that should not be trained as they are: the rules of a run, and the checks of single rows.

Rows are compared with each other in `duplicates`, with evaluation files in `contamination`; `personal` looks for data
of persons. Nothing here reads files or knows of Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft.config import Action, HygieneSection
from sft.contamination import Contamination, index_evaluation
from sft.duplicates import REASONS, Finding, Findings, row_key
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

    def dropped(self, finding: Finding) -> Reason | None:
        """The reason for which a row is left out, or None where it stays."""
        return next((reason for reason in finding.reasons if self.actions[reason] == "drop"), None)

    def flags(self, finding: Finding) -> tuple[str, ...]:
        """What is noted of a row that stays."""
        return tuple(str(reason) for reason in finding.reasons if self.actions[reason] == "flag")


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
    files = rules.evaluation.find(conversations) if rules.evaluation else [None] * len(conversations)
    return [_screen(*pair, rules) for pair in zip(conversations, files, strict=True)]


def _screen(conversation: Conversation, file: str | None, rules: HygieneRules) -> Screened | RowError:
    if file is not None and rules.contamination == "drop":
        return RowError(Reason.CONTAMINATED, "", f"the row shares text with the evaluation file {file}")
    try:
        conversation, kinds = screen_personal(conversation, rules.personal_data)
    except RowError as error:
        return error
    noted = [f"{Reason.CONTAMINATED}:{file}"] if file is not None else []
    return Screened(conversation, (*noted, *(f"{Reason.PERSONAL_DATA}:{kind}" for kind in kinds)))


def left_out(findings: Findings, rules: HygieneRules) -> NDArray[np.uint64]:
    """Returns the keys of the rows that are not trained, sorted: 8 bytes each, to be handed to every worker."""
    drops = sum(1 << i for i, reason in enumerate(REASONS) if rules.actions[reason] == "drop")
    return np.sort(findings.keys[(findings.bits & drops) > 0])


def is_left_out(ids: Sequence[str], keys: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Tells for each row by its id whether it is among the sorted keys."""
    if not len(keys):
        return np.zeros(len(ids), bool)
    wanted = np.array([row_key(row_id) for row_id in ids], np.uint64)
    found: NDArray[np.bool_] = keys[np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)] == wanted
    return found
