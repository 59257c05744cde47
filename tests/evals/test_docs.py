"""What docs/evaluation.md shows is what the code reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from evals.checkers import AnyChecker
from evals.gate import read_gate
from evals.instructions import AnyInstruction
from evals.suite import read_suites

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)


def test_the_suite_and_the_gate_of_the_guide_are_valid(tmp_path: Path) -> None:
    suite, gate = (tmp_path / name for name in ("suite.yaml", "gate.yaml"))
    suite.write_text(BLOCKS[0], encoding="utf-8")
    gate.write_text(BLOCKS[1], encoding="utf-8")
    assert [row.id for row in read_suites([suite])[0].rows] == ["france", "japan"]
    assert len(read_gate(gate).rules) == 4


def test_the_guide_names_every_checker_and_no_other() -> None:
    def kind(model: Any) -> str:
        return str(get_args(model.model_fields["kind"].annotation)[0])

    table = DOCS[DOCS.index("| kind |") : DOCS.index("- **Instructions**")]
    known = {kind(model) for model in get_args(get_args(AnyChecker)[0])}
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == known
    assert len(get_args(get_args(AnyInstruction)[0])) == 25
