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
        address: a cluster's address or auto; None joins the cluster that RAY_ADDRESS names (as submitted jobs have
            it), and starts a local Ray where there is none.
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
    if address is None and "RAY_ADDRESS" not in os.environ:
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


def shortage(wanted: dict[str, float]) -> str | None:
    """What the cluster lacks of these resources at present, in words; None where nothing is lacking."""
    import ray

    have = ray.cluster_resources()
    short = [
        f"{amount:g} {name} (the cluster has {have.get(name, 0):g})"
        for name, amount in wanted.items()
        if amount > have.get(name, 0)
    ]
    return ", ".join(short) or None
