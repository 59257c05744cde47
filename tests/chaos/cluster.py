"""A cluster of two raylets on this machine, and training runs on it that can be stopped at any place."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.config import TrainConfig
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
HOOKS = Path(__file__).parent / "hooks"
QUICK = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "2",
    "OMP_NUM_THREADS": "1",
}
"""What makes Ray Train notice and clear up sooner."""


class Chaos:
    """A running cluster.

    Args:
        cluster: Ray's cluster of raylets.
        control: the folder that arms places, see tests/chaos/hooks.
        dashboard: address of the job server.
    """

    def __init__(self, cluster: Any, control: Path, dashboard: str) -> None:
        self.cluster = cluster
        self.control = control
        self.dashboard = dashboard
        self.second: Any = None

    def add_node(self, cpus: int = 3) -> None:
        """Adds the second node."""
        self.second = self.cluster.add_node(num_cpus=cpus)
        self.cluster.wait_for_nodes()

    def kill_node(self) -> None:
        """Ends the second node's processes at once."""
        self.cluster.remove_node(self.second, allow_graceful=False)
        self.second = None

    def arm(self, place: str) -> None:
        (self.control / f"arm-{place}").touch()

    def slow(self, seconds: float) -> None:
        """Makes every step last longer; 0 ends that."""
        path = self.control / "slow"
        path.write_text(str(seconds)) if seconds else path.unlink()

    def wait(self, place: str, seconds: float = 180) -> int:
        """Waits until a process has come to an armed place; returns its id."""
        path = self.control / f"at-{place}"
        until(path.exists, f"nobody came to {place}", seconds)
        pid = int(path.read_text())
        path.unlink()
        return pid

    def start(self, config: TrainConfig) -> subprocess.Popen[str]:
        """Starts `python -m jobs.train` on the cluster; its output goes to a file beside the run's storage."""
        file = Path(config.storage).parent / f"{config.name}.yaml"
        file.write_text(config.model_dump_json())
        log = file.with_suffix(".log").open("a")
        with log:
            return subprocess.Popen(
                [sys.executable, "-m", "jobs.train", "--config", str(file), "--ray.address", self.cluster.address],
                cwd=ROOT,
                env={**os.environ, **QUICK},
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def run(self, config: TrainConfig, seconds: float = 300) -> str:
        """Runs a training job to its end; returns all that runs of this name have said."""
        process = self.start(config)
        return self.finish(config, process, seconds)

    def finish(self, config: TrainConfig, process: subprocess.Popen[str], seconds: float = 300) -> str:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"still running after {seconds} s:\n{log_of(config)[-4000:]}") from None
        assert code == 0, log_of(config)[-6000:]
        return log_of(config)


def log_of(config: TrainConfig) -> str:
    return (Path(config.storage).parent / f"{config.name}.log").read_text()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def until(done: Callable[[], object], otherwise: str, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)


@contextmanager
def chaos_cluster(folder: Path) -> Iterator[Chaos]:
    """Starts two raylets, of four and of three CPUs, and ends them."""
    import ray
    from ray.cluster_utils import Cluster

    control = folder / "control"
    control.mkdir()
    before = dict(os.environ)
    os.environ.update(QUICK, CHAOS_CONTROL=str(control), PYTHONPATH=f"{HOOKS}:{ROOT}")
    dashboard = free_port()
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "include_dashboard": True,
            "dashboard_port": dashboard,
            "_system_config": {"health_check_period_ms": 500, "health_check_failure_threshold": 4},
        },
    )
    try:
        chaos = Chaos(cluster, control, f"http://127.0.0.1:{dashboard}")
        chaos.add_node()
        yield chaos
    finally:
        ray.shutdown()
        cluster.shutdown()
        os.environ.clear()
        os.environ.update(before)


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    path = Path(config.storage) / config.name / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
