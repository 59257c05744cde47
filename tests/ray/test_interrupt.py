from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sft.checkpoint import verify_checkpoint
from tests.heads import Head
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(300)]
ROOT = Path(__file__).parents[2]


def test_ctrl_c_ends_with_a_clear_message_and_nothing_half_written(
    head: Head, tmp_path: Path, tiny_model: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        config(
            tmp_path,
            tiny_model,
            name="stopped",
            train={"epochs": 5000, "global_batch_size": 6, "layout": "padded"},
            ray={"address": head.address},
        ).model_dump_json()
    )
    errors = tmp_path / "errors.txt"
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "jobs.train", "--config", str(file)],
            cwd=ROOT,
            env=head.environment,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        guard = threading.Timer(240, process.kill)
        guard.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step ") and int(line.split()[1].split("/")[0]) > 3 and "stopping" not in line:
                process.send_signal(signal.SIGINT)
                break
        lines += process.stdout.readlines()
        code = process.wait(timeout=60)
        guard.cancel()
    assert code == 130, errors.read_text()[-2000:]
    assert "the same command goes on from the last one" in lines[-2]
    assert lines[-1] == f"report in {tmp_path}/runs/stopped/report.html\n"
    assert errors.read_text().splitlines()[-1] == "stopped"
    run = tmp_path / "runs/stopped"
    assert not (run / "bundle").exists()
    whole = [path for path in run.glob("checkpoint-*") if (path / "manifest.json").exists()]
    assert whole
    for path in whole:
        verify_checkpoint(path)
