from __future__ import annotations

import os
import signal
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sft.listener import Listener, Notice, Started
from sft.report import Reporter
from tests.sft.test_report import EVALUATION, STEP, steps_of


class Words:
    """A queue of words that were said already."""

    def __init__(self, *words: Any) -> None:
        self._words = deque(words)

    def get(self, timeout: float) -> Any:
        from ray.util.queue import Empty

        if self._words:
            return self._words.popleft()
        time.sleep(min(timeout, 0.01))
        raise Empty


def test_what_workers_say_is_said_and_recorded(tmp_path: Path) -> None:
    said: list[str] = []
    steps = [replace(STEP, step=step) for step in (10, 11, 11)]
    words = Words(Started(2), *steps[:2], Started(1), Notice("going on after step 10"), steps[2], EVALUATION)
    reporter = Reporter(
        str(tmp_path / "metrics.jsonl"), lambda _: None, evaluations=str(tmp_path / "evaluations.jsonl")
    )
    listener = Listener(words, reporter, said.append, lambda: "nothing to be had", None)
    listener.stop()
    assert said == ["a new group of 1 worker(s) has started", "going on after step 10"]
    assert steps_of(tmp_path / "metrics.jsonl") == [10, 11]
    assert steps_of(tmp_path / "evaluations.jsonl") == [10]
    assert listener.gave_up is None


@pytest.mark.parametrize(
    ("words", "lacking", "given_up"),
    [
        ([], "2 workers", "2 workers"),
        ([], None, "room for the workers, which other work holds at present"),
        ([Started(2)], None, None),  # they load a large model
        ([Started(2)], "2 workers", "2 workers"),  # a node was lost
    ],
)
def test_patience_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[Any], lacking: str | None, given_up: str | None
) -> None:
    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *sent: signals.append(sent))
    reporter = Reporter(str(tmp_path / "metrics.jsonl"), lambda _: None)
    listener = Listener(Words(*words), reporter, lambda _: None, lambda: lacking, 0.05)
    time.sleep(0.3)
    listener.stop()
    assert listener.gave_up == given_up
    assert signals == ([(os.getpid(), signal.SIGINT)] if given_up else [])
