from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from generate.config import SHIPPED_SEEDS, FiltersSection
from generate.rouge import rouge_l, tokens
from generate.seeds import SeedTask, read_seeds
from generate.sieve import instance_faults, instruction_fault, row_fault
from sft.errors import ConfigError
from sft.shingles import plain


@pytest.fixture(scope="module")
def seeds() -> list[SeedTask]:
    return read_seeds(SHIPPED_SEEDS)


def test_there_are_175_and_some_25_are_classifications(seeds: list[SeedTask]) -> None:
    assert len(seeds) == 175
    assert sum(task.classification for task in seeds) == 26
    assert all(len({one.output for one in task.instances}) > 1 for task in seeds if task.classification)


def test_all_differ(seeds: list[SeedTask]) -> None:
    assert len({task.id for task in seeds}) == 175
    assert len({plain(task.instruction) for task in seeds}) == 175
    words = [tokens(task.instruction) for task in seeds]
    assert max(rouge_l(one, other) for one, other in combinations(words, 2)) < 0.7


def test_every_seed_passes_the_filters(seeds: list[SeedTask]) -> None:
    filters = FiltersSection(language="en")
    faults = [(task.id, instruction_fault(task.instruction, filters)) for task in seeds]
    faults += [(row.id, row_fault(row, filters)) for task in seeds for row in task.rows()]
    for task in seeds:
        pairs = [(one.input, one.output) for one in task.instances]
        faults += [(task.id, fault) for fault in instance_faults(pairs)]
    assert [fault for fault in faults if fault[1]] == []


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in lines))
    return path


def test_all_faults_are_said_at_once_and_no_task_is_quoted(tmp_path: Path) -> None:
    good = {"id": "a", "instruction": "Say the SECRET.", "instances": [{"output": "x"}]}
    lines = (
        good,
        "{broken",
        {**good, "id": "b", "instances": []},
        {**good, "id": "c", "inputs": 1},
        {**good, "id": "d", "classification": True},
        good,
    )
    with pytest.raises(ConfigError) as caught:
        read_seeds(written(tmp_path / "seeds.jsonl", *lines))
    places = [fault.split(":")[0] for fault in caught.value.faults]
    assert places[:4] == ["line 2", "line 3", "line 4", "line 5"]
    assert "needs an input in each instance" in caught.value.faults[3]
    assert [fault.split(" stand")[0] for fault in caught.value.faults[4:]] == ["1 of the ids", "1 of the instructions"]
    assert "SECRET" not in str(caught.value)


def test_no_seeds(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no seed tasks"):
        read_seeds(written(tmp_path / "seeds.jsonl"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_seeds(tmp_path / "missing.jsonl")
