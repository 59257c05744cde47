"""What a benchmark ran on, and how much memory it took."""

from __future__ import annotations

import os
import platform
import threading
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import psutil

from sft.errors import RaysftError

SAMPLE_SECONDS = 0.1


class BenchmarkError(RaysftError):
    """A contender failed, or the contenders did not do the same work."""


def machine() -> dict[str, Any]:
    """The hardware in words and numbers."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.system(),
        "python": platform.python_version(),
    }


def versions(*packages: str) -> dict[str, str]:
    """Installed versions; packages that are not installed are left out."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class Watch:
    """Samples the memory of this process and all its children, and keeps the peak.

    Memory is counted as proportional set size: what processes share is counted once.

    Args:
        every: seconds between two samples; one takes some milliseconds for each process.
    """

    def __init__(self, every: float = SAMPLE_SECONDS) -> None:
        self.peak_bytes = 0
        self._every = every
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        while True:
            total = 0
            for process in [me, *me.children(recursive=True)]:
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.peak_bytes = max(self.peak_bytes, total)
            if self._stop.wait(self._every):
                return
