from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from serve.registry import Registry
from sft.adapter import verify_bundle
from tests.ray.conftest import Head
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def test_ray_job_submit_trains_and_publishes(head: Head, tmp_path: Path, tiny_model: Path) -> None:
    made = config(tmp_path, tiny_model, name="submitted", ray={})
    file = tmp_path / "run.yaml"
    file.write_text(made.model_dump_json())  # JSON is YAML
    registry = tmp_path / "registry"
    excludes = ["build", ".venv", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"]
    done = submit(
        head,
        f"--working-dir={ROOT}",
        f"--runtime-env-json={json.dumps({'excludes': excludes})}",
        "--",
        *(sys.executable, "-m", "jobs.train", "--config", str(file), "--train.epochs", "1"),
        *("--registry", str(registry), "--alias", "live"),
    )
    log = done.stdout + done.stderr
    assert done.returncode == 0, log[-4000:]
    assert "step 4/4" in log
    assert "published submitted@v1" in log
    assert "alias live -> submitted@v1" in log
    opened = Registry.open(str(registry))
    alias = opened.alias("live")
    assert alias is not None
    assert str(alias.version) == "submitted@v1"
    folder = opened.download(opened.get(alias.version), tmp_path / "adapter")
    assert verify_bundle(folder).lineage["run"] == "submitted"


def submit(head: Head, *words: str) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, again where a head that has just started says to try again."""
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [RAY, "job", "submit", f"--address={head.dashboard}", *words],
            env=head.environment,
            capture_output=True,
            text=True,
            timeout=350,
        )
        if "No available agent to submit job" not in done.stdout + done.stderr or time.monotonic() > end:
            return done
        time.sleep(1)


def test_without_the_token_a_job_is_refused(head: Head) -> None:
    bare = {name: value for name, value in head.environment.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [RAY, "job", "submit", f"--address={head.dashboard}", "--", sys.executable, "-c", "print(1)"],
        env={**bare, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "uthentication" in done.stdout + done.stderr
