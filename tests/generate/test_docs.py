"""What docs/generate.md shows is what the code reads and writes."""

from __future__ import annotations

import re
from pathlib import Path

from generate.candidate import Reason
from generate.evolve import OPERATIONS
from generate.seeds import read_seeds

DOCS = (Path(__file__).parents[2] / "docs" / "generate.md").read_text(encoding="utf-8")


def test_the_guide_names_every_reason_and_no_other() -> None:
    table = DOCS[DOCS.index("| reason |") : DOCS.index("- The pool are")]
    cells = re.findall(r"^\| (`.+?`) \|", table, re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} == set(Reason)


def test_the_guide_names_every_operation() -> None:
    assert all(f"`{operation}`" in DOCS for operation in OPERATIONS)


def test_the_seed_tasks_of_the_guide_are_valid(tmp_path: Path) -> None:
    path = tmp_path / "seeds.jsonl"
    path.write_text(re.findall(r"```json\n(.*?)```", DOCS, re.DOTALL)[0], encoding="utf-8")
    assert [task.id for task in read_seeds(path)] == ["tone", "haiku"]
