"""Magpie (arXiv 2406.08464): given its template up to a user's text, an aligned teacher says what a user may."""

from __future__ import annotations

from generate.candidate import Candidate, Fault, Outcome, Reason
from generate.round import Round, answered


def magpie(this: Round) -> list[Outcome]:
    """Makes candidates: instructions, then their answers."""
    settings = this.config.magpie
    asked = [
        this.continuation(settings.prefix, settings.stop, this.config.inventing)
        for _ in range(this.config.requests_per_round)
    ]
    outcomes: list[Outcome] = []
    for place, reply in enumerate(this.ask("users", asked)):
        said = Candidate(this.id(place), "magpie", reply.text.strip())
        fault = reply.fault or (Fault(Reason.CUT_OFF) if reply.cut_off else this.pool.claim(said.id, said.instruction))
        outcomes.append(fault.of(said) if fault else said)
    return answered(this, outcomes)
