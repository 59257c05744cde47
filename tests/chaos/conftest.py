"""A cluster of two nodes on this machine, each with room for one engine replica: a place to break things in."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from serve.config import ServeConfig
from serve.registry import Registry
from serve.versions import VersionId
from tests.bundles import lora_bundle
from tests.load import Load, until
from tests.ports import free_port
from tests.replicas import Replica, running_replicas

START_S = 400.0
"""Longest time for a replica to come up on two busy cores."""
STALL_S = 20.0
DRAIN_S = 120.0
WANTED = ("support@v1", "support@v2")


class Site:
    """The application on its cluster."""

    def __init__(self, config: ServeConfig, registry: Registry, client: httpx.Client) -> None:
        self.config, self.registry, self.client = config, registry, client
        self.url = str(client.base_url)
        self.cores: set[psutil.Process] = set()

    def deploy(self, least: int, most: int) -> None:
        """Deploys the generated config file; other bounds of autoscaling restart no replica."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        from serve.deploy import deploy_file

        content = yaml.safe_load(deploy_file(self.config))
        bounds = {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": 2, "upscale_delay_s": 2}
        content["applications"][0]["deployments"] = [{"name": "engine", "autoscaling_config": bounds}]
        client: Any = _get_global_client()
        client.deploy_apps(ServeDeploySchema.model_validate(content))

    def keep(self, count: int) -> list[Replica]:
        """Has so many replicas, and waits until they are ready."""
        self.deploy(count, count)
        return self.ready(count)

    def ready(self, count: int, without: Collection[Replica] = ()) -> list[Replica]:
        """Waits until so many replicas run and say what they hold, and none of `without` is among them."""
        gone = {replica.id for replica in without}

        def check() -> bool:
            found = running_replicas()
            return len(found) == count == len(self.statuses()) and not gone & {replica.id for replica in found}

        until(check, START_S)
        found = running_replicas()
        self.cores |= {replica.core for replica in found}
        return found

    def statuses(self) -> dict[str, Any]:
        """What every live replica says of itself."""
        answer = self.client.get("/admin/replicas")
        found: dict[str, Any] = answer.json()["replicas"] if answer.status_code == 200 else {}
        return found

    def load(self, clients: int = 3, **fields: Any) -> Load:
        """Clients of the two aliases."""
        return Load(self.url, ["support", "next"], clients, **fields)


@pytest.fixture(scope="module")
def site(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """`support@v1` (alias `support`) and `support@v2` (alias `next`), deployed from the generated file."""
    import ray
    from ray import serve
    from ray._common.utils import reset_ray_address
    from ray.cluster_utils import Cluster
    from ray.serve.config import HTTPOptions

    registry = Registry.open(tmp_path_factory.mktemp("registry"))
    for number, alias in ((1, "support"), (2, "next"), (3, None)):
        bundle = tmp_path_factory.mktemp("bundles") / str(number)
        lora_bundle(bundle, demo_model, seed=number)
        registry.publish(bundle, "support")
        if alias:
            registry.promote(alias, VersionId("support", number))
    config = ServeConfig.model_validate(
        {
            "registry": registry.address,
            "base": str(demo_model),
            "base_id": "smollm2-135m-instruct",
            "engine": {"max_model_len": 512, "max_lora_rank": 16, "cpus_per_replica": 2},
            "scaling": {"max_replicas": 2, "max_ongoing_requests": 4, "drain_s": DRAIN_S, "stall_s": STALL_S},
            "http": {"port": free_port()},
        }
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Room for one engine of two CPUs on each, and for the gateway on either.
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "gcs_server_port": free_port()})
    reset_ray_address()  # a Ray that others look for on this machine is not this one
    made = None
    try:
        cluster.add_node(num_cpus=3)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=config.http.port))
        with httpx.Client(base_url=f"http://127.0.0.1:{config.http.port}", timeout=120) as client:
            made = Site(config, registry, client)
            made.keep(1)
            yield made
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
        for core in made.cores if made else ():
            with suppress(psutil.NoSuchProcess):
                core.kill()
