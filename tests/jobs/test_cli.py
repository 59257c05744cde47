from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = ("train", "inspect_data", "adapters", "serve", "chat", "demo")


def job(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"jobs.{name}", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


@pytest.mark.parametrize("name", JOBS)
def test_help_names_the_config_and_explains(name: str) -> None:
    done = job(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"python -m jobs.{name}" in done.stdout
    assert "--config" in done.stdout


@pytest.mark.parametrize("name", ["train", "inspect_data", "serve", "demo"])
def test_a_bad_config_is_one_message_and_an_exit_code(name: str, tmp_path: Path) -> None:
    done = job(name, "--config", str(tmp_path / "none.yaml"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("none.yaml: 1 fault in the configuration\n  - there is no such file\n")


def test_faults_of_file_and_command_line_come_together(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("name: ok\nstorage: s\nmodel: {base: m}\ndata: {sources: [{path: x}]}\ntrain: {epochs: none}\n")
    done = job("train", "--config", str(file), "--lora.rank", "0", "--train.learnin_rate", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        "  - lora.rank: Input should be greater than 0, got '0'",
        "  - train.epochs: Input should be a valid integer, unable to parse string as an integer, got 'none'",
        "  - --train.learnin_rate: no such option; did you mean train.learning_rate?",
    ]
