"""The rows of `python -m jobs.bench.train`: fixed before any contender starts, in the order of a run of ours."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jobs.bench.machine import BenchmarkError
from sft.data import here, plan_data, prepare_rows
from sft.data_config import DataSection
from sft.feed import FeedPlan, training_rows
from sft.mask import Example
from sft.rows import examples

SOURCE = Path(__file__).parents[1] / "data/support/train.jsonl"
PACK_LENGTH = 512
PACKS_A_STEP = 2
HELD_OUT_PACKS = 6
SEED = 0

Pack = list[Example]


@dataclass(frozen=True)
class Workload:
    """What every contender trains: `steps` hold packs of examples, and so does `held_out`, which nobody trains."""

    steps: list[list[Pack]]
    held_out: list[Pack]

    @property
    def tokens(self) -> list[int]:
        """Tokens of each step's examples, without padding."""
        return [sum(len(example.input_ids) for pack in step for example in pack) for step in self.steps]

    @property
    def trained_tokens(self) -> list[int]:
        """Tokens of each step that carry a label."""
        return [sum(example.trained_tokens for pack in step for example in pack) for step in self.steps]


def data_section() -> DataSection:
    """The data as a run's config names it; one file, so that its order needs no Ray to be known."""
    return DataSection.model_validate({"sources": [{"path": str(SOURCE)}], "max_length": PACK_LENGTH})


def make_workload(base: Path, steps: int) -> Workload:
    """Prepares the shipped rows and cuts them into steps, as the feed of a run does.

    Raises:
        BenchmarkError: there are not rows enough for so many steps.
    """
    made = [example for table in here(plan_data(data_section(), base), prepare_rows) for example in examples(table)]
    plan = FeedPlan(SEED, data_section().shuffle_window, PACKS_A_STEP, 1, "packed", 0, PACK_LENGTH)
    packs = [list(pack) for pack in training_rows(made, plan, 0)]
    most = (len(packs) - HELD_OUT_PACKS) // PACKS_A_STEP
    if steps > most:
        raise BenchmarkError(f"--steps {steps}: the shipped rows are enough for {most}")
    cut = [packs[first : first + PACKS_A_STEP] for first in range(0, steps * PACKS_A_STEP, PACKS_A_STEP)]
    return Workload(cut, packs[-HELD_OUT_PACKS:])


def write_workload(work: Workload, path: Path) -> None:
    """Writes a workload as JSON."""
    packs = [*[pack for step in work.steps for pack in step], *work.held_out]
    plain = [[[e.id, e.input_ids.tolist(), e.labels.tolist()] for e in pack] for pack in packs]
    path.write_text(json.dumps({"steps": len(work.steps), "packs": plain}))


def read_workload(path: Path) -> Workload:
    """Reads what `write_workload` wrote."""
    read = json.loads(path.read_text())
    packs = [
        [Example(name, np.array(ids, np.int32), np.array(labels, np.int32)) for name, ids, labels in pack]
        for pack in read["packs"]
    ]
    trained = read["steps"] * PACKS_A_STEP
    steps = [packs[first : first + PACKS_A_STEP] for first in range(0, trained, PACKS_A_STEP)]
    return Workload(steps, packs[trained:])
