"""The phases of a job that goes through several: each has a line in the terminal and its seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def phase(console: Console, name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Tells that a phase begins, and enters its seconds under its name where it ends well."""
    console.rule(f"[bold]{name}", align="left")
    begin = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - begin
