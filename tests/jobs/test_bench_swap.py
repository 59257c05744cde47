"""The measurement of swaps, on a real gateway and registry, with engines that are stand-ins: a sound one and others."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from jobs.bench import serve_swap
from jobs.bench.load import Address
from jobs.bench.machine import BenchmarkError
from jobs.bench.serve_peers import Setup
from jobs.bench.serve_swap import ALIAS, NAME, VERSIONS
from serve.items import DONE, Final, Item, Usage
from serve.registry import Registry
from serve.requests import Route
from serve.traffic import Target
from tests.ports import free_port
from tests.registries import made_bundle
from tests.serve.stand_in import StandIn, gateway_app

FLIPS = 4
TOKENS = 6


class Parrot(StandIn):
    """Says the same to the same version and prompt, a token every few milliseconds."""

    def said_by(self, target: Target, token: int) -> str:  # noqa: ARG002
        return str(target)

    async def answer(
        self,
        route: Route,  # noqa: ARG002
        body: dict[str, Any],
        target: Target,
        request_id: str,  # noqa: ARG002
    ) -> AsyncGenerator[Item, None]:
        prompt = body["messages"][0]["content"]
        for token in range(TOKENS):
            await asyncio.sleep(0.02)
            text = hashlib.sha256(f"{self.said_by(target, token)} {prompt} {token}".encode()).hexdigest()[:4]
            yield f'data: {{"choices":[{{"delta":{{"content":"{text}"}}}}]}}\n\n'
        yield Final(f'data: {{"choices":[],"usage":{{"completion_tokens":{TOKENS}}}}}\n\n{DONE}', Usage(1, TOKENS))


class Mixer(Parrot):
    """Once asked through the alias, goes on by the version that the alias names by now: what must never happen."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self._registry = registry

    def said_by(self, target: Target, token: int) -> str:
        entry = self._registry.alias(ALIAS)
        return str(entry.version if entry and entry.number > 1 and token > 2 else target)


class Deaf(Parrot):
    """Says the same whatever version is asked: its answers prove nothing."""

    def said_by(self, target: Target, token: int) -> str:  # noqa: ARG002
        return "base"


async def measured(engine: StandIn, registry: Registry, folder: Path) -> dict[str, Any]:
    port = free_port()
    app = gateway_app(engine, registry)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        setup = Setup(folder, folder, "float32")
        return await serve_swap._measure(Address(port), setup, registry, ["p", "q"], FLIPS, 3)
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry:
    monkeypatch.setattr(serve_swap, "_bundle", lambda setup, seed: made_bundle(setup.folder, seed))
    made = Registry.open(tmp_path / "registry", create=True)
    for seed in range(VERSIONS):
        version = made.publish(made_bundle(tmp_path, seed), NAME)
    made.promote(ALIAS, version.id)
    return made


def test_a_sound_server_fails_and_mixes_nothing(registry: Registry, tmp_path: Path) -> None:
    found = asyncio.run(measured(Parrot(), registry, tmp_path))
    assert (found["flips"], found["failed"], found["mixed"]) == (FLIPS, 0, 0)
    assert found["answers_through_a_flip"] > 0
    assert found["answers"] == sum(found["answers_by_version"].values())
    assert 0 < found["flip_p50_ms"] <= found["flip_p99_ms"] <= found["flip_in_force_p99_ms"]
    assert 0 < found["publish_to_served_s"] <= found["publish_to_served_max_s"]
    moves = [entry.action for entry in registry.history(ALIAS)]
    assert moves == ["promote", "promote", "promote", "promote", "rollback"]


def test_a_server_that_mixes_is_found_out(registry: Registry, tmp_path: Path) -> None:
    found = asyncio.run(measured(Mixer(registry), registry, tmp_path))
    assert found["mixed"] > 0
    along = found["mixtures"][0]["characters_along_with"][found["mixtures"][0]["version"]]
    assert 12 <= along < found["mixtures"][0]["characters"]


def test_versions_that_say_the_same_prove_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="differs from version to version"):
        asyncio.run(measured(Deaf(), registry, tmp_path))
