"""What a cluster's nodes are: their resources, and the versions of what a worker imports there."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("ray", "torch", "transformers", "peft", "deepspeed")

ANSWER_S = 120.0
"""How long a node may take to start a task; the first one on a node starts a process."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node. Rule: `versions` is None where it did not answer; a package that it lacks is not in it."""

    name: str
    resources: Mapping[str, float]
    versions: Mapping[str, str] | None = None

    def room(self, each: Mapping[str, float]) -> int:
        """How many workers of these resources it can hold."""
        return int(min(self.resources.get(name, 0.0) / amount for name, amount in each.items()))


def versions() -> dict[str, str]:
    """Versions in this process; a build's own mark, such as +cpu, is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            continue
    return found


def nodes() -> list[Node]:
    """All live nodes of the cluster that this process has joined, each asked by a task that runs there."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = [node for node in ray.nodes() if node["Alive"]]
    task: Any = ray.remote(num_cpus=0, max_retries=0)(versions)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in alive]
    asked = [task.options(scheduling_strategy=place).remote() for place in places]
    ready = set(ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)[0])
    return [
        Node(node["NodeManagerAddress"], node["Resources"], _answer(answer) if answer in ready else None)
        for node, answer in zip(alive, asked, strict=True)
    ]


def _answer(answer: Any) -> dict[str, str] | None:
    import ray
    from ray.exceptions import RayError

    try:
        found: dict[str, str] = ray.get(answer)
    except RayError:
        return None
    return found


def differences(node: Node, own: Mapping[str, str]) -> list[str]:
    """What a node has otherwise than this process, in words.

    A worker's Python may differ from the driver's in its last number, as Ray allows it.
    """
    if node.versions is None:
        return [f"it did not answer within {ANSWER_S:g} s"]
    found = []
    for package, wanted in own.items():
        got = node.versions.get(package, "none")
        if package == "python":
            got, wanted = (text.rpartition(".")[0] for text in (got, wanted))
        if got != wanted:
            found.append(f"{package} {got}, here {wanted}")
    return found
