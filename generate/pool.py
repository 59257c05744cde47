"""The pool: seed tasks and kept rows, which new prompts are drawn from and new rows are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from random import Random

from generate.candidate import Candidate, Fault, Reason
from generate.config import FiltersSection
from generate.near import NearIndex
from generate.rouge import RougeIndex
from generate.seeds import SeedTask
from generate.sieve import instruction_fault, row_fault
from sft.shingles import plain


class Pool:
    """What there is so far. It changes in one order only, whatever order answers came in."""

    def __init__(self, seeds: Sequence[SeedTask], filters: FiltersSection) -> None:
        self.seeds = list(seeds)
        self.rows: list[Candidate] = []
        self._filters = filters
        self._instructions: dict[str, str] = {}
        self._rouge = RougeIndex(filters.rouge)
        self._near = NearIndex(filters.near_duplicates)
        for task in seeds:
            self._instructions[plain(task.instruction)] = task.id
            self._rouge.add(task.id, task.instruction)
        self._near.add([row for task in seeds for row in task.rows()])

    def claim(self, id: str, instruction: str, family: Collection[str] = ()) -> Fault | None:
        """Takes an instruction in, or says why not. It stays taken whatever becomes of its row.

        Args:
            id: of the candidate.
            instruction: its text.
            family: ids of the rows that it was evolved from, which it may be like, but not equal to.
        """
        fault = instruction_fault(instruction, self._filters)
        if fault:
            return fault
        same = self._instructions.get(plain(instruction))
        if same is not None:
            return Fault(Reason.DUPLICATE, same)
        match = self._rouge.nearest(instruction, family)
        if match:
            return Fault(Reason.ROUGE, f"{match.score:.2f} with {match.id}")
        self._instructions[plain(instruction)] = id
        self._rouge.add(id, instruction)
        return None

    def keep(self, row: Candidate) -> Fault | None:
        """Takes a row in whose instruction was claimed, or says why not."""
        fault = row_fault(row, self._filters)
        if fault:
            return fault
        near = self._near.nearest(row)
        if near is not None:
            return Fault(Reason.NEAR_DUPLICATE, near)
        self._near.add([row])
        self.rows.append(row)
        return None

    def context(self, draw: Random, written: int, generated: int) -> list[str]:
        """Draws instructions for a prompt, in random order; seed tasks stand in for kept rows where there are few."""
        kept = list(dict.fromkeys(row.instruction for row in self.rows))
        chosen = draw.sample(kept, min(generated, len(kept)))
        wanted = min(written + generated - len(chosen), len(self.seeds))
        chosen += draw.sample([task.instruction for task in self.seeds], wanted)
        draw.shuffle(chosen)
        return chosen

    def examples(self, draw: Random, classification: bool, count: int) -> list[SeedTask]:
        """Draws seed tasks of one kind, in random order."""
        kind = [task for task in self.seeds if task.classification == classification]
        return draw.sample(kind, min(count, len(kind)))

    def parents(self, draw: Random, generations: int, count: int) -> list[Candidate]:
        """Draws rows that were evolved less often than that, and seed tasks; all of them differ if they can."""
        fit = [dataclasses.replace(task.rows()[0], id=task.id) for task in self.seeds]
        fit += [row for row in self.rows if len(row.parents) < generations]
        return [*draw.sample(fit, min(count, len(fit))), *draw.choices(fit, k=max(0, count - len(fit)))]
