"""The proof that what a model is asked is not what it was trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evals.errors import EvaluationError
from evals.suite import Row, Suite
from sft.section import Section

WORD = re.compile(r"\w+")
LONG = 6
"""Words from which on a trained prompt that occurs inside a question counts as a leak; shorter ones are anywhere."""


class LeakError(EvaluationError):
    """Something that is asked is in the training data, so that a score would say nothing."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training row asks, and where it belongs; task and cluster are empty where it names none."""

    prompt: str
    task: str = ""
    cluster: str = ""


class Proof(Section):
    """What was compared, and found apart.

    Rule: none of `asked` rows' questions stands in one of `trained` rows' prompts or the other way about; no task of
    `held_out_tasks` and no cluster of `held_out_clusters` is among the trained ones.
    """

    asked: int
    trained: int
    trained_tasks: list[str]
    trained_clusters: list[str]
    held_out_tasks: list[str]
    held_out_clusters: list[str]


def prove_apart(
    suites: Sequence[Suite], trained: Iterable[Trained], held_out: Mapping[str, str] | None = None
) -> Proof:
    """Proves that no question of the suites is trained, and no held-out task or cluster.

    Questions and prompts are compared as words, without case and punctuation. A question that stands inside a prompt
    is found whatever template is wrapped around it.

    Args:
        suites: what is asked.
        trained: every row that reaches training.
        held_out: tasks that must not be trained, each with its cluster, none of whose tasks may be.

    Raises:
        LeakError: something is; names rows, tasks and clusters, never what they hold.
    """
    rows = list(trained)
    prompts = {form: one for one in rows if (form := _form(one.prompt))}
    everything = "\n".join(prompts)
    faults = []
    asked = [(suite.name, row) for suite in suites for row in suite.rows]
    for name, row in asked:
        question = _form(_question(row))
        # Most questions are nowhere; only for those that are, it matters where.
        if question in everything or any(len(form.split()) >= LONG and form in question for form in prompts):
            faults.append(f"suite {name}: the question of row {row.id} is in the training data")
    tasks = {one.task for one in rows} - {""}
    clusters = {one.cluster for one in rows} - {""}
    held = held_out or {}
    faults += [f"task {task} is held out and trained" for task in sorted(held.keys() & tasks)]
    faults += [f"cluster {cluster} is held out and trained" for cluster in sorted(set(held.values()) & clusters)]
    if faults:
        raise LeakError("\n".join(["evaluation and training are not apart:", *(f"  - {fault}" for fault in faults)]))
    return Proof(
        asked=len(asked),
        trained=len(rows),
        trained_tasks=sorted(tasks),
        trained_clusters=sorted(clusters),
        held_out_tasks=sorted(held),
        held_out_clusters=sorted(set(held.values())),
    )


def trained_questions(questions: Iterable[str], trained: Iterable[Trained]) -> set[str]:
    """Those of the questions that stand in a training row's prompt."""
    everything = "\n".join({_form(one.prompt) for one in trained})
    return {question for question in questions if _form(question) in everything}


def _question(row: Row) -> str:
    return "\n".join(message["content"] for message in row.messages if message["role"] == "user")


def _form(text: str) -> str:
    """A text's words, each between two spaces, so that one form stands in another only in whole words."""
    found = WORD.findall(text.casefold())
    return f" {' '.join(found)} " if found else text.strip()
