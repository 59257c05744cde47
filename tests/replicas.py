"""The engine replicas of a running application, as processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil

from serve.app import APP


@dataclass(frozen=True, slots=True)
class Replica:
    """An engine replica that Serve calls running."""

    id: str
    pid: int
    node: str

    @property
    def core(self) -> psutil.Process:
        """The process of its engine, which the replica's own process started."""
        for child in psutil.Process(self.pid).children(recursive=True):
            if "EngineCore" in " ".join((child.name(), *child.cmdline())):
                return child
        raise AssertionError(f"there is no engine core below process {self.pid}")


def running_replicas() -> list[Replica]:
    """Those that Serve sends requests to."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    engine = client.get_serve_details()["applications"].get(APP, {}).get("deployments", {}).get("engine", {})
    return [
        Replica(found["replica_id"], found["pid"], found["node_id"])
        for found in engine.get("replicas", ())
        if found["state"] == "RUNNING"
    ]
