"""Evol-Instruct (arXiv 2304.12244): tasks made harder or turned into others, and the failures eliminated."""

from __future__ import annotations

from collections.abc import Sequence

from generate import prompts
from generate.candidate import Candidate, Fault, Outcome, Reason
from generate.parsing import leak, read_choice
from generate.round import Reply, Round, answered
from generate.sieve import answer_fault

SOURCE = "evolve/"
OPERATIONS = (*prompts.DEPTH, *prompts.BREADTH)


def evolve(this: Round) -> list[Outcome]:
    """Makes candidates: evolved tasks, then whether they are others than before, then their answers."""
    parents = this.pool.parents(this.draw, this.config.evolve.generations, this.config.requests_per_round)
    outcomes = _evolved(this, parents)
    outcomes = _gaining(this, parents, outcomes)
    return answered(this, outcomes, answer_fault)


def _evolved(this: Round, parents: Sequence[Candidate]) -> list[Outcome]:
    operations = [this.draw.choice(OPERATIONS) for _ in parents]
    asked = [
        this.chat(prompts.evolve(parent.prompt, operation), this.config.inventing)
        for parent, operation in zip(parents, operations, strict=True)
    ]
    outcomes: list[Outcome] = []
    for place, reply in enumerate(this.ask("evolve", asked)):
        parent = parents[place]
        family = (*parent.parents, parent.id)
        task = Candidate(this.id(place), SOURCE + operations[place], reply.text.strip(), parents=family)
        fault = reply.fault or _evolution_fault(task, reply)
        fault = fault or this.pool.claim(task.id, task.instruction, family)
        outcomes.append(fault.of(task) if fault else task)
    return outcomes


def _evolution_fault(task: Candidate, reply: Reply) -> Fault | None:
    repeated = leak(task.instruction)
    if reply.cut_off:
        return Fault(Reason.CUT_OFF)
    return Fault(Reason.PROMPT_LEAK, repeated) if repeated else None


def _gaining(this: Round, parents: Sequence[Candidate], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Asks whether deeper tasks are the same as before. One of the same field was compared with the whole pool."""
    asked = {
        one.id: this.chat(prompts.gains(parent.prompt, one.instruction), this.config.answering)
        for parent, one in zip(parents, outcomes, strict=True)
        if isinstance(one, Candidate) and one.source.removeprefix(SOURCE) in prompts.DEPTH
    }
    replies = dict(zip(asked, this.ask("gains", list(asked.values())), strict=True))
    return [
        _judged(one, replies[one.id]) if isinstance(one, Candidate) and one.id in replies else one for one in outcomes
    ]


def _judged(task: Candidate, reply: Reply) -> Outcome:
    choice = read_choice(reply.text, ("equal", "different"))
    if choice is None:
        return (reply.fault or Fault(Reason.UNREADABLE, "neither equal nor different")).of(task)
    return Fault(Reason.NO_GAIN, task.parents[-1]).of(task) if choice == "equal" else task
