from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.registry import Registry
from sft.adapter import verify_bundle
from tests.heads import RAY, Head, submit_here
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_ray_job_submit_trains_and_publishes(head: Head, tmp_path: Path, tiny_model: Path) -> None:
    made = config(tmp_path, tiny_model, name="submitted", ray={})
    file = tmp_path / "run.yaml"
    file.write_text(made.model_dump_json())  # JSON is YAML
    registry = tmp_path / "registry"
    code, log = submit_here(
        head,
        *(sys.executable, "-m", "jobs.train", "--config", str(file), "--train.epochs", "1"),
        *("--registry", str(registry), "--alias", "live"),
    )
    assert code == 0, log[-4000:]
    assert "step 4/4" in log
    assert "published submitted@v1" in log
    assert "alias live -> submitted@v1" in log
    opened = Registry.open(str(registry))
    alias = opened.alias("live")
    assert alias is not None
    assert str(alias.version) == "submitted@v1"
    folder = opened.download(opened.get(alias.version), tmp_path / "adapter")
    assert verify_bundle(folder).lineage["run"] == "submitted"


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
