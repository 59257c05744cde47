from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import pytest

from serve.registry import Registry
from serve.relay import Relay
from serve.versions import VersionId
from tests.bundles import tiny_bundle
from tests.registries import filled_registry, made_bundle
from tests.serve.stand_in import StandIn, client_of, gateway_app


@pytest.fixture
def engine() -> StandIn:
    return StandIn()


@pytest.fixture
async def relay() -> AsyncIterator[Relay]:
    made = Relay()
    yield made
    if made._server:
        made._server.close()


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Holds `support@v1`, with the alias `support`, and `support@v2`."""
    made = Registry.open(tmp_path / "registry", create=True)
    tiny_bundle(tmp_path / "bundle")
    for _ in range(2):
        made.publish(tmp_path / "bundle", "support")
    made.promote("support", VersionId("support", 1))
    return made


@pytest.fixture
def client(engine: StandIn, registry: Registry) -> httpx.AsyncClient:
    """A client of a gateway without keys."""
    return client_of(gateway_app(engine, registry))


@pytest.fixture
def filled(tmp_path: Path) -> Registry:
    return filled_registry(tmp_path / "registry")


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[int], Path]:
    return lambda seed: made_bundle(tmp_path, seed)


@pytest.fixture(autouse=True)
def _heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Serve's logger is told can be read by tests, whatever an engine that ran before has set."""
    heard = logging.getLogger("ray.serve")
    monkeypatch.setattr(heard, "propagate", True)
    monkeypatch.setattr(heard, "level", logging.NOTSET)
    heard._cache.clear()  # type: ignore[attr-defined]
