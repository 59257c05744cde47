from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import psutil
import pytest

from tests.ports import free_port


@dataclass(frozen=True, slots=True)
class Head:
    """A Ray head with token authentication, as `ray start` makes it."""

    address: str
    dashboard: str
    environment: dict[str, str]


@pytest.fixture(scope="package")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """Starts one Ray head for all tests of this folder, and stops it by its process group."""
    port, dashboard = free_port(), free_port()
    environment = dict(os.environ)
    command = [
        str(Path(sys.executable).with_name("ray")),
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
    log = tmp_path_factory.mktemp("head") / "ray.log"
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


@pytest.fixture(scope="package")
def cluster(head: Head) -> Iterator[str]:
    """Connects this process to the head; gives its address."""
    import ray

    from sft.cluster import connect

    connect(head.address, num_cpus=None, needed_cpus=1)
    yield head.address
    ray.shutdown()
