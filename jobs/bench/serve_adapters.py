"""Many adapters in the engine's few slots: throughput and first token as their number grows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jobs.bench.bundles import random_bundle
from jobs.bench.load import Address, Call, figures, run_calls
from jobs.bench.machine import BenchmarkError
from jobs.bench.serve_peers import Setup, our_command, running
from serve.registry import Registry

NAME = "many"
COUNTS = (1, 8, 32)
TOKENS = 32


def measure_adapters(setup: Setup, prompts: Sequence[str], requests: int, streams: int) -> dict[str, Any]:
    """Starts our server on a registry of versions and asks 1, 8 and 32 of them in turn.

    Raises:
        BenchmarkError: a request failed.
    """
    folder = setup.folder / "adapters"
    folder.mkdir()
    setup = replace(setup, folder=folder)
    registry = Registry.open(str(folder / "registry"), create=True)
    versions = []
    for seed in range(max(COUNTS)):
        bundle = folder / f"bundle-{seed}"
        random_bundle(bundle, setup.base, seed=seed)
        versions.append(str(registry.publish(bundle, NAME).id))
    with running(setup, "adapters", our_command) as address:
        return asyncio.run(_measure(address, versions, prompts, requests, streams))


async def _measure(
    address: Address, versions: Sequence[str], prompts: Sequence[str], requests: int, streams: int
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for count in COUNTS:
        chosen = versions[:count]
        # Every version has answered once before it counts: the download and the proof are publishing's, not serving's.
        await run_calls(address, [Call(version, "Hello", 4) for version in chosen], 1)
        calls = [
            Call(chosen[n % count], f"Ticket {n} of {count}: {prompts[n % len(prompts)]}", TOKENS)
            for n in range(max(requests, count))
        ]
        measured = figures(*await run_calls(address, calls, streams))
        if measured["failed"]:
            raise BenchmarkError(f"{measured['failed']} of {len(calls)} requests to {count} adapters failed")
        found[str(count)] = measured
        speed = f"{measured['tokens_per_s']:.1f} tokens/s, first token p50 {measured['first_token_ms']['p50']:.0f} ms"
        print(f"adapters: {count:2} in use: {speed}", flush=True)
    return found
