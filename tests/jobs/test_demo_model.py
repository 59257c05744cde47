"""Processes that want the demo's base model at the same time: one makes it, all have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import demo_model
from jobs.demo_model import prepare_demo_model


def _write(folder: Path, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(text)


def test_the_faster_process_wins_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"

    def convert(_source: Path, target: Path) -> None:
        _write(target, "mine")
        _write(folder, "another's")

    monkeypatch.setattr(demo_model, "_convert", convert)
    assert prepare_demo_model(folder) is False
    assert (folder / "config.json").read_text() == "another's"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_is_no_model_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "notes.txt").write_text("somebody's")
    monkeypatch.setattr(demo_model, "_convert", lambda _source, target: _write(target, "mine"))
    with pytest.raises(OSError, match="not empty"):
        prepare_demo_model(folder)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
