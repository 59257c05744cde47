"""A Ray of its own with token authentication, as `ray start` makes it, and jobs on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True, slots=True)
class Head:
    """Where it is, and the environment in which commands reach it."""

    address: str
    dashboard: str
    environment: dict[str, str]


def ray_job(dashboard: str, *words: str, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """`ray job VERB ...`, again where a head that has just started says to try again; exit code and all it said."""
    end = time.monotonic() + 60
    while True:
        done = subprocess.run(
            [RAY, "job", words[0], f"--address={dashboard}", *words[1:]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=550,
        )
        said = done.stdout + done.stderr
        if "No available agent to submit job" not in said or time.monotonic() > end:
            return done.returncode, said
        time.sleep(1)


def job_id(said: str) -> str:
    """The id of a job, out of what `ray job submit` said."""
    return next(word for word in (word.strip("'") for word in said.split()) if word.startswith("raysubmit_"))


def submit_here(head: Head, *command: str, wait: bool = True) -> tuple[int, str]:
    """Submits a command with this checkout as its working directory, as a user does from its root."""
    excludes = ["build", ".venv", ".git", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis"]
    words = [f"--working-dir={ROOT}", f"--runtime-env-json={json.dumps({'excludes': excludes})}", "--", *command]
    flags = [] if wait else ["--no-wait"]
    return ray_job(head.dashboard, "submit", *flags, *words, environment=head.environment)


@contextmanager
def ray_head(folder: Path) -> Iterator[Head]:
    """Starts a head of eight CPUs, and stops it by its process group; its log goes to the folder."""
    port, dashboard = free_port(), free_port()
    environment = dict(os.environ)
    command = [
        RAY,
        "start",
        "--head",
        "--block",
        "--node-ip-address=127.0.0.1",
        f"--port={port}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",  # the default may be another cluster's
        "--num-cpus=8",
        "--disable-usage-stats",
    ]
    log = folder / "ray.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait(f"http://127.0.0.1:{dashboard}/api/version", environment["RAY_AUTH_TOKEN"], process, log)
        yield Head(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", environment)
    finally:
        _end(process.pid)
        process.wait()


def _end(pid: int) -> None:
    """Ends a process and all that it started, by process id."""
    root = psutil.Process(pid)
    family = [root, *root.children(recursive=True)]
    root.terminate()
    _, alive = psutil.wait_procs(family, timeout=5)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _wait(url: str, token: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    while time.monotonic() < end:
        if process.poll() is not None:
            pytest.fail(f"ray start ended: {log.read_text()[-2000:]}")
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    pytest.fail("the Ray dashboard did not answer within 120 s")
