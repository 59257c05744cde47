"""`python -m jobs.bench.train`: our trainer, TRL and a plain loop on the same model, rows, LoRA, cores and precision.

Every contender runs in a process of its own; they take turns, round after round, so that what else the machine does
meets all of them. The first steps (caches, first allocations) are kept apart from the steady rate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.bench.machine import BenchmarkError, Watch, machine, versions
from jobs.bench.train_contenders import ADAPTER, CONTENDERS, first_adapter, held_out_loss, recovery
from jobs.bench.train_rows import PACK_LENGTH, PACKS_A_STEP, make_workload, read_workload, write_workload
from jobs.bench.train_work import flop_per_token, matrix_rate
from jobs.demo_model import prepare_demo_model

DEMO_BASE = Path("build/demo/model")
FIRST_STEPS = 2
MEMORY_SECONDS = 0.5
LOSS_TOLERANCE = 0.02
"""Largest share by which the contenders' losses on held-out rows may differ: they sum in other orders."""
DESCRIPTION = """Measure our trainer against TRL's SFTTrainer (padded and packed) and a plain PyTorch and PEFT loop:
tokens a second, peak memory, share of the machine's matrix rate, and the time to recover from a killed worker. Writes
JSON. Needs the packages of requirements/bench.txt.
"""
RECOVERY = "recovery"
NAMES = (*CONTENDERS, RECOVERY)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all contenders and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.train", description=DESCRIPTION)
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES), help="contenders (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender; the median counts (default: 3)")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps (default: 10)")
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("build/bench/train.json"), help="where to write the figures")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        return _one(arguments.one, arguments.folder, arguments.base)
    if arguments.steps <= FIRST_STEPS:
        parser.error(f"--steps: the first {FIRST_STEPS} are kept apart, so at least {FIRST_STEPS + 1} are needed")
    if arguments.base == DEMO_BASE:
        prepare_demo_model(arguments.base)
    base = arguments.base.absolute()
    with tempfile.TemporaryDirectory(prefix="raysft-bench-") as made:
        folder = Path(made)
        work = make_workload(base, arguments.steps)
        write_workload(work, folder / "work.json")
        first_adapter(base, folder / "first.safetensors")
        rates: list[dict[str, float]] = []
        runs: dict[str, list[dict[str, Any]]] = {}
        for number in range(arguments.rounds):
            rates.append(matrix_rate(len(os.sched_getaffinity(0))))
            for name in arguments.only:
                if name != RECOVERY or number == 0:
                    runs.setdefault(name, []).append(_run(name, folder / f"{name}-{number}", base, work))
        losses = {name: held_out_loss(work, base, folder / f"{name}-0" / ADAPTER) for name in runs if name != RECOVERY}
    result = summary(runs, losses, {key: max(rate[key] for rate in rates) for key in rates[0]}, base, work)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    for key, value in result.items():
        if key.startswith("ratio_"):
            print(f"{key} {value:.2f}")
    print(f"figures in {arguments.out}")
    return 0


def summary(
    runs: dict[str, list[dict[str, Any]]],
    losses: dict[str, float],
    rates: dict[str, float],
    base: Path,
    work: Any,
) -> dict[str, Any]:
    """Makes the figures of all runs.

    Raises:
        BenchmarkError: the contenders did not learn the same.
    """
    if losses and max(losses.values()) > min(losses.values()) * (1 + LOSS_TOLERANCE):
        raise BenchmarkError(f"the contenders learned different things; losses on held-out rows: {losses}")
    share = sum(work.trained_tokens) / sum(work.tokens)
    flop, dtype = flop_per_token(base, share)
    contenders = {}
    for name in losses:
        middle = statistics.median(run["tokens_per_s"] for run in runs[name])
        contenders[name] = {
            "tokens_per_s": middle,
            "trained_tokens_per_s": middle * share,
            "tokens_per_s_with_start": statistics.median(run["tokens_per_s_with_start"] for run in runs[name]),
            "first_steps_s": statistics.median(sum(run["step_s"][:FIRST_STEPS]) for run in runs[name]),
            "start_s": statistics.median(run["start_s"] for run in runs[name]),
            "peak_bytes": statistics.median(run["peak_bytes"] for run in runs[name]),
            "share_of_matrix_rate": middle * flop / (rates[dtype] * 1e9),
            "held_out_loss": losses[name],
            "losses": runs[name][0]["losses"],
        }
    result: dict[str, Any] = {}
    for mine, mark in (("ours", ""), ("trainer", "_on_ray")):
        for peer in ("trl_padded", "trl_packed", "plain", "trl_padded_default", "trl_packed_default"):
            if mine in contenders and peer in contenders:
                ratio = contenders[mine]["tokens_per_s"] / contenders[peer]["tokens_per_s"]
                result[f"ratio_vs_{peer}{mark}"] = ratio
    if RECOVERY in runs:
        result["recover_s"] = runs[RECOVERY][0]["recover_s"]
    return {
        **result,
        "contenders": contenders,
        "matrix_gflop_per_s": rates,
        "precision": dtype,
        "gflop_per_token": flop / 1e9,
        "bound_tokens_per_s": rates[dtype] * 1e9 / flop,
        "trained_share": share,
        "steps": len(work.steps),
        "first_steps": FIRST_STEPS,
        "pack_length": PACK_LENGTH,
        "packs_a_step": PACKS_A_STEP,
        "runs": runs,
        "base": base.name,
        "machine": machine(),
        "versions": versions("raysft", "torch", "transformers", "peft", "deepspeed", "ray", "trl", "accelerate"),
    }


def _one(name: str, folder: Path, base: Path) -> int:
    import torch

    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    work = read_workload(folder.parent / "work.json")
    with Watch(MEMORY_SECONDS) as watch:
        told = (recovery if name == RECOVERY else CONTENDERS[name])(work, base, folder, cores)
    (folder / "told.json").write_text(json.dumps({**told.to_dict(), "peak_bytes": watch.peak_bytes}))
    return 0


def _run(name: str, folder: Path, base: Path, work: Any) -> dict[str, Any]:
    folder.mkdir()
    begin = time.time()
    command = [sys.executable, "-m", "jobs.bench.train", "--one", name, "--folder", str(folder), "--base", str(base)]
    # Each contender sets its own threads; a number from outside would hold for every one of Ray's workers.
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    whole = time.time() - begin
    if done.returncode:
        raise BenchmarkError(f"{name} failed:\n{done.stderr.strip()[-2000:]}")
    told: dict[str, Any] = json.loads((folder / "told.json").read_text())
    if name == RECOVERY:
        print(f"{name:18} {told['recover_s']:.1f} s from the kill to the next step", flush=True)
        return told
    edges = [told.pop("first_begin"), *told.pop("ends")]
    seconds = [after - before for before, after in itertools.pairwise(edges)]
    steady = sum(work.tokens[FIRST_STEPS:]) / sum(seconds[FIRST_STEPS:])
    print(
        f"{name:18} {steady:7.1f} tokens/s  {told['peak_bytes'] / 2**20:6,.0f} MiB  "
        f"start {whole - sum(seconds):5.1f} s  last loss {told['losses'][-1]:.4f}",
        flush=True,
    )
    return {
        **told,
        "step_s": seconds,
        "start_s": whole - sum(seconds),
        "tokens_per_s": steady,
        "tokens_per_s_with_start": sum(work.tokens) / whole,
    }


if __name__ == "__main__":
    cli.run(main)
