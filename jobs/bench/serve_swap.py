"""Swaps under load: an alias moves between versions while streams of requests go to it, and no answer may be mixed."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.bundles import random_bundle
from jobs.bench.load import Address, Answer, Call, ask, fetch, middle_and_tail, run_calls
from jobs.bench.machine import BenchmarkError
from jobs.bench.serve_peers import Setup, our_command, running
from serve.keys import Key, hash_key, new_key
from serve.registry import Registry

NAME = ALIAS = "bench"
VERSIONS = 3
PROMPTS = 8
TOKENS = 24
STRENGTH = 0.4
"""Such adapters say other things from the first word on, so no mixture passes for an answer of one of them."""
PUBLISHED = 5
FIRST_TOKENS = 4
"""Enough for some text: the first token of an adapter may be a part of a character."""
PAUSE_S = 0.1
"""Between two flips, after the first was seen: shorter than an answer, so answers live through several flips."""
LOOK_S = 0.05
FLIP_S = 30.0
SHOWN = 5

Golden = Mapping[str, Mapping[str, str]]
"""Version -> prompt -> the greedy answer of that version, as it was in every trial before the first flip."""


def measure_swap(setup: Setup, prompts: Sequence[str], flips: int, streams: int) -> dict[str, Any]:
    """Starts our server on a registry of random versions, in float32 so that texts can be compared.

    Raises:
        BenchmarkError: the versions' answers cannot be told apart, so nothing would be proven; or a flip failed.
    """
    folder = setup.folder / "swap"
    folder.mkdir()
    setup = replace(setup, folder=folder, dtype="float32")
    registry = Registry.open(str(folder / "registry"), create=True)
    for seed in range(VERSIONS):
        version = registry.publish(_bundle(setup, seed), NAME)
    registry.promote(ALIAS, version.id)
    key = new_key("bench")
    keys = folder / "keys.jsonl"
    entry = Key(id="bench", hash=hash_key(key), scopes=("chat", "admin"))
    keys.write_text(json.dumps(entry.model_dump(mode="json", exclude_none=True)) + "\n", encoding="utf-8")
    command = partial(our_command, access={"keys": str(keys)})
    with running(setup, "swap", command, key) as address:
        return asyncio.run(_measure(address, setup, registry, prompts[:PROMPTS], flips, streams))


async def _measure(
    address: Address, setup: Setup, registry: Registry, prompts: Sequence[str], flips: int, streams: int
) -> dict[str, Any]:
    versions = [str(version.id) for version in registry.versions(NAME)]
    golden = await golden_answers(address, versions, prompts, streams)
    steady = list(golden[versions[0]])
    print(f"swap: {len(steady)} of {len(prompts)} prompts have one greedy answer a version", flush=True)
    stop = asyncio.Event()
    questions = itertools.cycle(steady)
    answers: list[Answer] = []

    async def stream() -> None:
        while not stop.is_set():
            answers.append(await ask(address, Call(ALIAS, next(questions), TOKENS)))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
        try:
            moves = await _flip(address, versions, flips)
        finally:
            stop.set()
    published = await _publish(address, setup, registry)
    return {**judged(answers, golden, [at for at, _, _ in moves]), **_flip_figures(moves), **published}


async def golden_answers(address: Address, versions: Sequence[str], prompts: Sequence[str], streams: int) -> Golden:
    """Asks every version every prompt: alone, then among requests to other versions, in batches of changing make.

    How numbers are rounded hangs on the batch, so a prompt whose answers differ between those trials proves nothing
    about versions; it is left out.

    Raises:
        BenchmarkError: a request failed; or no prompt is left that tells the versions apart.
    """
    calls = [Call(version, prompt, TOKENS) for prompt in prompts for version in versions]
    trials = [(calls, 1), (calls, streams), (calls[::-1], max(streams // 2, 1))]
    said: dict[tuple[str, str], set[str]] = {}
    for asked, parallel in trials:
        for answer in (await run_calls(address, asked, parallel))[1]:
            if answer.error is not None:
                raise BenchmarkError(f"{answer.call.model} gave no golden answer: {answer.error}")
            said.setdefault((answer.call.model, answer.call.prompt), set()).add(answer.text)
    steady = [prompt for prompt in prompts if tells_apart([said[version, prompt] for version in versions])]
    if not steady:
        raise BenchmarkError("no prompt has one steady answer a version that differs from version to version")
    return {version: {prompt: next(iter(said[version, prompt])) for prompt in steady} for version in versions}


def tells_apart(texts: Sequence[set[str]]) -> bool:
    """Whether each version said one and the same text in all trials, and no two versions the same."""
    return all(len(found) == 1 for found in texts) and len(set.union(*texts)) == len(texts)


def judged(answers: Sequence[Answer], golden: Golden, flipped_at: Sequence[float]) -> dict[str, Any]:
    """Counts answers: failed ones, and mixed ones, whose text is not the golden of the version that they name.

    Args:
        answers: what was said under load.
        golden: see `Golden`.
        flipped_at: when the alias moved.

    Raises:
        BenchmarkError: fewer than two versions answered, or no answer lived through a flip: nothing would be proven.
    """
    failed = [answer for answer in answers if answer.error is not None]
    whole = [answer for answer in answers if answer.error is None]
    mixed = [a for a in whole if a.text != golden.get(a.version or "", {}).get(a.call.prompt)]
    across = sum(any(a.arrivals[0] < moment < a.arrivals[-1] for moment in flipped_at) for a in whole)
    by_version = Counter(answer.version for answer in whole)
    if len(by_version) < 2 or not across:
        raise BenchmarkError(f"nothing is proven: {across} answers lived through a flip; versions: {dict(by_version)}")
    return {
        "answers": len(answers),
        "failed": len(failed),
        "mixed": len(mixed),
        "answers_through_a_flip": across,
        "answers_by_version": {str(version): count for version, count in sorted(by_version.items(), key=str)},
        "failures": [str(answer.error) for answer in failed[:SHOWN]],
        "mixtures": [_mixture(answer, golden) for answer in mixed[:SHOWN]],
    }


def _mixture(answer: Answer, golden: Golden) -> dict[str, Any]:
    """How far a mixed answer goes along with each version's golden, in characters."""

    def shared(text: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(text, answer.text, strict=False)) if a != b), len(text))

    along = {version: shared(texts.get(answer.call.prompt, "")) for version, texts in golden.items()}
    return {"version": answer.version, "characters": len(answer.text), "characters_along_with": along}


async def _flip(address: Address, versions: Sequence[str], flips: int) -> list[tuple[float, float, float]]:
    """Moves the alias again and again: to the next version, and every fourth time back.

    Returns:
        For each flip: when it was asked for, when the server had said yes, and when it was in force.
    """
    moves = []
    following = itertools.cycle(versions)
    for number in range(1, flips + 1):
        begun_at = time.perf_counter()
        if number % 4:
            body = {"version": next(following)}
            status, said = await fetch(address, "POST", f"/admin/aliases/{ALIAS}/promote", body)
        else:
            status, said = await fetch(address, "POST", f"/admin/aliases/{ALIAS}/rollback", {})
        if status != 200:
            raise BenchmarkError(f"flip {number} was refused: {status} {said}")
        done_at = time.perf_counter()
        while (await fetch(address, "GET", f"/v1/models/{ALIAS}"))[1]["root"] != said["entry"]["version"]:
            if time.perf_counter() - done_at > FLIP_S:
                raise BenchmarkError(f"flip {number} was not in force after {FLIP_S:g} s")
            await asyncio.sleep(LOOK_S)
        moves.append((begun_at, done_at, time.perf_counter()))
        if number % max(flips // 10, 1) == 0:
            print(f"swap: {number} of {flips} flips", flush=True)
        await asyncio.sleep(PAUSE_S)
    return moves


def _flip_figures(moves: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    said = middle_and_tail([done - begun for begun, done, _ in moves])
    seen = middle_and_tail([seen - begun for begun, _, seen in moves])
    return {
        "flips": len(moves),
        "flip_p50_ms": said["p50"],
        "flip_p99_ms": said["p99"],
        "flip_in_force_p50_ms": seen["p50"],
        "flip_in_force_p99_ms": seen["p99"],
    }


async def _publish(address: Address, setup: Setup, registry: Registry) -> dict[str, Any]:
    """Publishes further versions and asks each at once, then once more, when the engine holds it.

    The server has one engine, so the first answer is that of all replicas. What the first takes longer than the second
    is the download, the verification and the engine's load.
    """
    first: list[float] = []
    again: list[float] = []
    for seed in range(VERSIONS, VERSIONS + PUBLISHED):
        bundle = _bundle(setup, seed)
        version = await asyncio.to_thread(registry.publish, bundle, NAME)
        published_at = time.perf_counter()
        for times, begun_at in ((first, published_at), (again, None)):
            answer = await ask(address, Call(str(version.id), "Hello", FIRST_TOKENS))
            if answer.error is not None or answer.version != str(version.id):
                raise BenchmarkError(f"{version.id} was not served after it was published: {answer.error}")
            times.append(answer.arrivals[0] - (begun_at or answer.begun_at))
    return {
        "publish_to_served_s": round(statistics.median(first), 3),
        "publish_to_served_max_s": round(max(first), 3),
        "loaded_first_token_s": round(statistics.median(again), 3),
    }


def _bundle(setup: Setup, seed: int) -> Path:
    folder = setup.folder / f"bundle-{seed}"
    random_bundle(folder, setup.base, seed=seed, strength=STRENGTH)
    return folder
