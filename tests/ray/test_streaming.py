from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.streaming import STORE_BYTES

pytestmark = pytest.mark.ray
ROWS = 26_000


def test_a_set_larger_than_memory_allows_streams_through(tmp_path: Path, tiny_model: Path) -> None:
    """Over four times the object store, none of it spilled; and the first pack is there long before the last."""
    text = "ten chars." * 200
    for number in range(2):
        with (tmp_path / f"{number}.jsonl").open("w") as file:
            for row in range(ROWS // 2):
                file.write(json.dumps({"instruction": f"{row} {text}", "output": "yes"}) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ray.streaming", str(tmp_path), str(tiny_model)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["rows"] == ROWS
    assert told["bytes"] > 4 * STORE_BYTES
    assert told["grown"] < 2 * STORE_BYTES
    assert not told["spilled"]
    assert told["rows_before_the_first"] < ROWS / 4
