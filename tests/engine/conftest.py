"""One real application for all engine tests: Serve, the gateway and vLLM with a real base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from serve.config import ServeConfig
from serve.registry import Registry
from serve.versions import VersionId
from tests.bundles import lora_bundle
from tests.ports import free_port

BASE = "smollm2-135m-instruct"
GUARD = {
    "checkers": {"json": {"aliases": ["guarded"], "check": {"kind": "json"}, "at_least": 0.9}},
    "sample": 1,
    "min_requests": 5,
    "check_s": 0.5,
}


@dataclass(frozen=True)
class Endpoint:
    """The running application."""

    url: str
    config: ServeConfig
    registry: Registry
    client: httpx.Client


@pytest.fixture(scope="session")
def bundles(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Makes real bundles, one a seed."""
    root = tmp_path_factory.mktemp("bundles")

    def make(seed: int) -> Path:
        folder = root / str(seed)
        if not folder.exists():
            lora_bundle(folder, demo_model, seed=seed)
        return folder

    return make


# Of the package, not the session: an engine that stays up takes the cores of all later tests, and a process can be
# connected to one Ray at a time.
@pytest.fixture(scope="package")
def endpoint(
    demo_model: Path, bundles: Callable[[int], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Endpoint]:
    """An application that serves `support@v1` (alias `support`) and `support@v2`."""
    import ray

    from serve import app

    registry = Registry.open(tmp_path_factory.mktemp("registry"))
    for seed in (1, 2):
        registry.publish(bundles(seed), "support")
    registry.promote("support", VersionId("support", 1))
    config = ServeConfig.model_validate(
        {
            "registry": registry.address,
            "base": str(demo_model),
            "base_id": BASE,
            "engine": {"max_model_len": 512, "max_lora_rank": 16, "tool_call_parser": "hermes"},
            "guard": GUARD,
            "http": {"port": free_port()},
            "ray": {"num_cpus": 8},
        }
    )
    try:
        address = app.start(config)
        root = address.removesuffix("/v1")
        with httpx.Client(base_url=root, timeout=120) as client:
            yield Endpoint(root, config, registry, client)
    finally:
        app.stop()
        ray.shutdown()
