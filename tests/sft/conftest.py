from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def worker_groups(tiny_model: Path) -> Path:
    """What groups of 1, 2 and 3 workers found in plain processes; see tests/sft/groups.py."""
    return run_groups(tiny_model, "some")


def run_groups(tiny_model: Path, choice: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "tests.sft.groups", str(tiny_model.parent), choice],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return tiny_model.parent
