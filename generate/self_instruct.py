"""Self-Instruct (arXiv 2212.10560): new tasks from a list of tasks, their kind, and instances of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from generate import prompts
from generate.candidate import Candidate, Fault, Outcome, Reason, Rejected
from generate.parsing import read_choice, read_instances, read_tasks
from generate.round import Reply, Round
from generate.sieve import instance_faults

SOURCE = "self_instruct"
CLASSIFICATION = f"{SOURCE}/classification"
OPEN = f"{SOURCE}/open"
KIND_EXAMPLES = {True: 6, False: 9}
"""Seed tasks of each kind in the prompt that asks for a task's kind."""
INSTANCE_EXAMPLES = 5


def self_instruct(this: Round) -> list[Outcome]:
    """Makes candidates: tasks, then their kinds, then instances, by their kind with output or input first."""
    outcomes = _tasks(this)
    outcomes = _kinds(this, outcomes)
    return _instances(this, outcomes)


def _tasks(this: Round) -> list[Outcome]:
    settings = this.config.self_instruct
    contexts = [
        this.pool.context(this.draw, settings.written, settings.generated)
        for _ in range(this.config.requests_per_round)
    ]
    asked = [this.chat(prompts.more_tasks(one, settings.tasks), this.config.inventing) for one in contexts]
    outcomes: list[Outcome] = []
    for request, reply in enumerate(this.ask("tasks", asked)):
        tasks = read_tasks(reply.text)
        if not tasks:
            unread = Candidate(this.id(request, 0), SOURCE, reply.text)
            outcomes.append((reply.fault or Fault(Reason.UNREADABLE, "no numbered list")).of(unread))
        for place, task in enumerate(tasks):
            candidate = Candidate(this.id(request, place), SOURCE, task)
            last = place == len(tasks) - 1
            fault = Fault(Reason.CUT_OFF) if reply.cut_off and last else this.pool.claim(candidate.id, task)
            outcomes.append(fault.of(candidate) if fault else candidate)
    return outcomes


def _kinds(this: Round, outcomes: Sequence[Outcome]) -> list[Outcome]:
    tasks = [one for one in outcomes if isinstance(one, Candidate)]
    examples = [task for kind, count in KIND_EXAMPLES.items() for task in this.pool.examples(this.draw, kind, count)]
    this.draw.shuffle(examples)
    asked = [this.chat(prompts.is_classification(one.instruction, examples), this.config.answering) for one in tasks]
    replies = iter(this.ask("kinds", asked))
    return [one if isinstance(one, Rejected) else _with_kind(one, next(replies)) for one in outcomes]


def _with_kind(task: Candidate, reply: Reply) -> Outcome:
    choice = read_choice(reply.text, ("yes", "no"))
    if choice is None:
        return (reply.fault or Fault(Reason.UNREADABLE, "neither yes nor no")).of(task)
    return dataclasses.replace(task, source=CLASSIFICATION if choice == "yes" else OPEN)


def _instances(this: Round, outcomes: Sequence[Outcome]) -> list[Outcome]:
    most = this.config.self_instruct.instances
    examples = {
        source: this.pool.examples(this.draw, source == CLASSIFICATION, INSTANCE_EXAMPLES)
        for source in (CLASSIFICATION, OPEN)
    }
    tasks = [one for one in outcomes if isinstance(one, Candidate)]
    asked = [
        this.chat(
            prompts.instances(one.instruction, examples[one.source], one.source == CLASSIFICATION, most),
            this.config.answering,
        )
        for one in tasks
    ]
    replies = iter(this.ask("instances", asked))
    return [
        row for one in outcomes for row in ([one] if isinstance(one, Rejected) else _rows(one, next(replies), most))
    ]


def _rows(task: Candidate, reply: Reply, most: int) -> list[Outcome]:
    found = read_instances(reply.text, task.source == CLASSIFICATION)
    if not found:
        unread = dataclasses.replace(task, output=reply.text)
        return [(reply.fault or Fault(Reason.UNREADABLE, "no instance")).of(unread)]
    faults = instance_faults(found)
    if reply.cut_off:
        faults[-1] = Fault(Reason.CUT_OFF)
    faults[most:] = [Fault(Reason.SURPLUS, f"more than {most} instances")] * len(faults[most:])
    rows: list[Outcome] = []
    for place, ((given, output), fault) in enumerate(zip(found, faults, strict=True)):
        row = dataclasses.replace(task, id=f"{task.id}-{place}", input=given, output=output)
        rows.append(fault.of(row) if fault else row)
    return rows
