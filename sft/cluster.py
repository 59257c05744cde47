"""Joining a Ray cluster, or starting a small one in place."""

from __future__ import annotations

import logging
import os
from typing import Any

from sft.errors import RaysftError

WORKER_ENV = {"TOKENIZERS_PARALLELISM": "false"}


class ClusterError(RaysftError):
    """There is no Ray cluster to use, or not the resources that were asked for."""


def connect(address: str | None, *, num_cpus: int | None, needed_cpus: float) -> bool:
    """Connects this process to Ray.

    Args:
        address: a cluster's address or auto; local starts a Ray here; None joins the cluster that RAY_ADDRESS names
            (as submitted jobs have it), and starts a local Ray where there is none.
        num_cpus: logical CPUs of a Ray that is started here.
        needed_cpus: what the caller will reserve; a Ray that is started here has at least that.

    Returns:
        Whether a Ray was started here.

    Raises:
        ClusterError: the address answers not, or refuses.
    """
    import ray

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    if ray.is_initialized():
        return False
    # The driver's own lines are the run's story; what workers print stays in Ray's logs and dashboard.
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    options["runtime_env"] = {"env_vars": WORKER_ENV}
    if address == "local" or (address is None and "RAY_ADDRESS" not in os.environ):
        cores = os.cpu_count() or 1
        ray.init(
            address="local",
            num_cpus=num_cpus or max(cores, int(needed_cpus) + 1),
            include_dashboard=False,
            **options,
        )
        return True
    try:
        ray.init(address=address or "auto", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ClusterError(f"no Ray cluster at {address or os.environ['RAY_ADDRESS']} ({error})") from None
    return False


def shortage(workers: int, each: dict[str, float]) -> str | None:
    """What the cluster's nodes lack at present to hold these workers, in words; None where nothing is lacking.

    A CPU must be left for the tasks that read the data: without one the workers would wait for it for ever.

    Args:
        workers: their number.
        each: resources of one worker, which must be on one node.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(node.get(name, 0.0) / amount for name, amount in each.items())) for node in nodes)
    spare = sum(node.get("CPU", 0.0) for node in nodes) - workers * each.get("CPU", 0.0)
    if room >= workers and spare >= 1:
        return None
    asked = ", ".join(f"{amount * workers:g} {name}" for name, amount in each.items())
    one = ", ".join(f"{amount:g} {name}" for name, amount in each.items())
    have = ", ".join(f"{sum(node.get(name, 0.0) for node in nodes):g} {name}" for name in each)
    return (
        f"{workers} worker(s) with {one} each, {asked} together{' and a CPU for the data' if room >= workers else ''}; "
        f"the cluster has {have} on {len(nodes)} node(s), which is room for {room}"
    )
