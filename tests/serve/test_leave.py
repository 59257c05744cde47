"""Processes that end, and what ends with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest

SCRIPT = """
import multiprocessing, os, signal, sys, time
from serve.leave import leave, tie_children
if __name__ == "__main__":
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    guard = tie_children()
    os.kill(child.pid, signal.SIGSTOP)
    print(child.pid, flush=True)
    sys.stdin.readline()
    leave("it is over")
"""


@pytest.mark.parametrize(("how", "code"), [("leave", 1), ("kill", -signal.SIGKILL)])
def test_a_hung_child_ends_with_its_parent(how: str, code: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin
        assert parent.stdout
        assert parent.stderr
        child = psutil.Process(int(parent.stdout.readline()))
        until(lambda: child.status() == psutil.STATUS_STOPPED)
        if how == "kill":
            os.kill(parent.pid, signal.SIGKILL)
        else:
            parent.stdin.write("\n")
            parent.stdin.flush()
            assert "this replica ends: it is over" in parent.stderr.read()
        assert parent.wait(10) == code
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def until(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)
