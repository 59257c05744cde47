"""A round: what a mode needs to make candidates, and the candidates that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from evals.answer import split
from evals.client import Route
from evals.records import Record
from generate.candidate import Candidate, Fault, Outcome, Reason
from generate.config import GenerateConfig, SamplingSection
from generate.pool import Pool

Ask = Callable[[str, Sequence["Question"]], list["Reply"]]
"""Asks the teacher questions of one stage; replies come in the questions' order."""


@dataclass(frozen=True, slots=True)
class Question:
    """One request: its body without the model, and where it goes."""

    body: dict[str, Any]
    route: Route = "chat/completions"


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. Rule: `failure` is empty exactly where there is an answer; `text` is without the thinking."""

    text: str
    failure: str = ""
    cut_off: bool = False

    @classmethod
    def of(cls, record: Record) -> Reply:
        """The reply in a record."""
        text = split(record.text, record.reasoning).answer
        return cls(text, record.failure, record.finish_reason == "length")

    @property
    def fault(self) -> Fault | None:
        """Why there is no answer to read; an answer that was cut off is one."""
        return Fault(Reason.TEACHER_FAILED, self.failure) if self.failure else None


@dataclass(frozen=True, slots=True)
class Round:
    """One round. Rule: `draw` is seeded with the run's seed and the round's number alone."""

    number: int
    config: GenerateConfig
    pool: Pool
    draw: Random
    ask: Ask

    @classmethod
    def begin(cls, number: int, config: GenerateConfig, pool: Pool, ask: Ask) -> Round:
        """Starts a round."""
        return cls(number, config, pool, Random(f"{config.seed}/{number}"), ask)

    def id(self, *places: int) -> str:
        """The id of a candidate by its places in the round."""
        return "-".join(map(str, (self.number, *places)))

    def chat(self, prompt: str, sampling: SamplingSection) -> Question:
        """Asks a question as a user. Each question has a seed of its own, so that equal ones differ."""
        return Question({"messages": [{"role": "user", "content": prompt}], **self._drawn(sampling)})

    def continuation(self, prefix: str, stop: Sequence[str], sampling: SamplingSection) -> Question:
        """Asks to continue a text."""
        body: dict[str, Any] = {"prompt": prefix, **self._drawn(sampling)}
        return Question({**body, "stop": list(stop)} if stop else body, "completions")

    def _drawn(self, sampling: SamplingSection) -> dict[str, Any]:
        return {**sampling.model_dump(), "seed": self.draw.getrandbits(31)}


def answered(
    this: Round, outcomes: Sequence[Outcome], fault_of: Callable[[str], Fault | None] = lambda _: None
) -> list[Outcome]:
    """Asks for the outputs of all candidates.

    Args:
        this: the round.
        outcomes: candidates without an output, and rejected ones, which stay as they are.
        fault_of: what is wrong with an output, beyond what is always looked for.
    """
    candidates = [one for one in outcomes if isinstance(one, Candidate)]
    replies = iter(this.ask("answers", [this.chat(one.prompt, this.config.answering) for one in candidates]))
    found: list[Outcome] = []
    for one in outcomes:
        if isinstance(one, Candidate):
            reply = next(replies)
            whole = dataclasses.replace(one, output=reply.text)
            fault = reply.fault or (Fault(Reason.CUT_OFF) if reply.cut_off else fault_of(reply.text))
            found.append(fault.of(whole) if fault else whole)
        else:
            found.append(one)
    return found
