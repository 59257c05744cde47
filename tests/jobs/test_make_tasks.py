from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.make_tasks import KINDS, LEFT_OUT, TEMPLATES, main
from sft.census import Cell
from sft.config import TrainConfig, read_config
from sft.errors import DataError
from sft.files import list_files
from sft.formats import RowSpec, to_conversation
from sft.holdout import HoldOut, prove
from sft.mixture import Mixture, shares

CONFIG = Path(__file__).parents[2] / "jobs" / "configs" / "flan-style-train.yaml"
TASKS = ["aiw", "caesar_cipher", "course_schedule", "gcd", "list_functions", "propositional_logic", "codeio"]


def installed() -> bool:
    try:
        importlib.import_module("reasoning_gym")
    except ImportError:
        return False
    return True


needs_package = pytest.mark.skipif(not installed(), reason="the optional package reasoning_gym is not installed")


def make(out: Path, *more: str) -> None:
    assert main(["--out", str(out), "--rows-per-task", "12", "--seed", "5", "--tasks", *TASKS, *more]) == 0


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*/*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row: dict[str, Any] = json.loads(line)
            assert path == folder / row["cluster"] / f"{row['task']}.jsonl"
            yield row


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "set"
    make(folder)
    return folder


@needs_package
def test_rows_say_what_they_are_and_can_be_trained(made: Path) -> None:
    found = list(rows(made))
    assert Counter((row["cluster"], row["task"]) for row in found) == {
        ("logic", "aiw"): 12,
        ("algorithmic", "caesar_cipher"): 12,
        ("graphs", "course_schedule"): 12,
        ("arithmetic", "gcd"): 12,
        ("induction", "list_functions"): 12,
    }
    for row in found:
        assert set(row) == {"instruction", "output", "task", "cluster", "template_id", "index"}
        user, assistant = to_conversation(row, RowSpec("alpaca")).messages
        before, _, after = TEMPLATES[row["template_id"]].partition("{question}")
        before = before.format(kind=KINDS[row["cluster"]], title=row["task"].replace("_", " "))
        assert user.content.startswith(before)
        assert user.content.endswith(after)
        assert assistant.content == row["output"]
    assert len({row["instruction"] for row in found}) == len(found)
    assert len({row["template_id"] for row in found}) == len(TEMPLATES) == 10


@needs_package
def test_the_index_tells_what_was_made_and_what_was_left_out(made: Path) -> None:
    index = json.loads((made / "tasks.json").read_text())
    assert (index["seed"], index["rows_per_task"], index["rows"]) == (5, 12, 60)
    assert index["generator"].startswith("reasoning_gym ")
    assert index["left_out"] == {"propositional_logic": "it has no single answer", "codeio": LEFT_OUT["codeio"]}
    first = index["tasks"][0]
    assert (first["task"], first["cluster"], first["file"], first["rows"]) == (
        "caesar_cipher",
        "algorithmic",
        "algorithmic/caesar_cipher.jsonl",
        12,
    )
    assert first["settings"]["max_rotation"] == 25


@needs_package
def test_the_same_seed_makes_the_same_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "77")
    again, other = tmp_path / "again", tmp_path / "other"
    make(again)
    assert {path.name: path.read_bytes() for path in again.glob("*/*")} == {
        path.name: path.read_bytes() for path in made.glob("*/*")
    }
    out = capsys.readouterr().out
    assert "/7] arithmetic/gcd: 12 rows in " in out
    assert "/7] logic/propositional_logic: left out, it has no single answer" in out
    assert out.endswith(f"{again}: 60 rows of 5 tasks in 5 clusters; 2 tasks left out (see tasks.json)\n")
    make(other, "--seed", "6")
    assert not {row["instruction"] for row in rows(other)} & {row["instruction"] for row in rows(made)}


@needs_package
def test_the_shipped_config_holds_its_clusters_out_of_such_a_set(made: Path) -> None:
    data = read_config(TrainConfig, CONFIG).data
    (source,) = data.sources
    path = source.path.replace("build/tasks", str(made))
    counts = Counter(Cell(source.label, row["task"], row["cluster"]) for row in rows(made))
    assert {file.name for file in list_files(path, source.label)} == {f"{c.cluster}/{c.task}.jsonl" for c in counts}
    hold_out = HoldOut(frozenset(data.hold_out.tasks), frozenset(data.hold_out.clusters))
    report = prove(counts, hold_out)
    assert report.held_out.clusters == ("graphs", "logic")
    assert report.held_out.tasks == ("aiw", "course_schedule")
    mixture = Mixture(data.mixture.over, data.mixture.mode, cap=data.mixture.cap)
    assert {share.group.task: share.target for share in shares(counts, mixture, hold_out)} == {
        "caesar_cipher": 12,
        "gcd": 12,
        "list_functions": 12,
    }


@needs_package
def test_what_cannot_be_made_is_said_and_nothing_is_left_behind(made: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        make(made)
    with pytest.raises(DataError, match="there is no task gdc; did you mean gcd"):
        main(["--out", str(tmp_path / "none"), "--tasks", "gdc"])
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(DataError, match="make setup-tasks"):
        main(["--out", str(tmp_path / "set")])


def test_bad_numbers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "set"), "--rows-per-task", "0"])
    assert "must be a whole number of 1 or more, got '0'" in capsys.readouterr().err
