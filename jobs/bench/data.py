"""`python -m jobs.bench.data`: our data path and the field's usual one on the same rows and cores.

Ours is read, convert, mask and pack: in plain processes, as the peer works, and on Ray Data (`ray`), as a training run
works. The peer is `datasets.map` with an assistant mask through `apply_chat_template`, then TRL's packing. Every
contender runs in processes of its own, held to the same cores; a first pass warms it up (imports, tokenizer,
worker processes) and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from jobs import cli
from jobs.bench.machine import BenchmarkError, Watch, machine, versions
from jobs.demo_model import prepare_demo_model
from sft.data import DataPlan, plan_data
from sft.data_config import DataSection
from sft.pack import best_fit, efficiency
from sft.rows import examples

Work = tuple[list[int], int, int]
"""Lengths of the examples, trained tokens, packs."""

PACK_LENGTH = 2048
WINDOW = 10_000
DEMO_BASE = Path("build/demo/model")
CONTENDERS = ("ours", "ray", "peer")
DESCRIPTION = """Measure the data path against datasets.map and TRL's packing: rows and tokens a second, peak memory,
packing efficiency, on one core and on two. Writes JSON. Needs the packages of requirements/bench.txt.
"""


@dataclass(frozen=True)
class Measured:
    """One contender's figures; `peak_bytes` is the most that all its processes held at once, shared memory once."""

    rows: int
    tokens: int
    trained_tokens: int
    seconds: float
    rows_per_s: float
    tokens_per_s: float
    peak_bytes: int
    packs: int
    packing_efficiency: float


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all contenders and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.data", description=DESCRIPTION)
    parser.add_argument("--rows", type=int, default=40_000, help="rows to read (default: 40000)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contender; the median counts (default: 3)")
    parser.add_argument("--base", type=Path, default=DEMO_BASE, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path("build/bench/data.json"), help="where to write the figures")
    parser.add_argument("--one", choices=[*CONTENDERS], help=argparse.SUPPRESS)
    parser.add_argument("--cores", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        return _one(arguments)
    if arguments.base == DEMO_BASE:
        prepare_demo_model(arguments.base)
    with tempfile.TemporaryDirectory(prefix="raysft-bench-") as folder:
        write_rows(Path(folder) / "rows.jsonl", arguments.rows)
        runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
        available = len(os.sched_getaffinity(0))
        for _ in range(arguments.repeat):
            for cores in [1, 2] if available > 1 else [1]:
                for name in CONTENDERS:
                    runs.setdefault((name, cores), []).append(_run(name, cores, Path(folder), arguments.base))
    result = _result(runs, arguments.base)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    ratio, memory = result["ratio_vs_datasets"], result["memory_ratio"]
    print(f"{ratio:.1f} times the peer's tokens a second, in {memory:.2f} of its memory")
    print(f"figures in {arguments.out}")
    return 0


def write_rows(path: Path, count: int) -> None:
    """Writes short rows: the shipped support tickets, each a little different."""
    shipped = Path(__file__).parents[1] / "data/support/train.jsonl"
    tickets = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = dict(tickets[number % len(tickets)])
            row["instruction"] = f"{row['instruction']} (ticket {number})"
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def ours(cores: int, base: Path) -> Callable[[Path], Work]:
    """Our path in plain processes, as the peer's: what `jobs.inspect_data` runs."""
    from sft.data import here, prepare_rows

    return lambda path: _packed(here(_plan(path, base), prepare_rows, cores))


def ray(cores: int, base: Path) -> Callable[[Path], Work]:
    """Our path on Ray Data, with as many preparing tasks as cores: what a training run reads."""
    import ray

    from sft.data import on_ray, prepare_rows

    # One logical CPU more, for the task that only reads; the cores are what the processes are held to.
    options: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "object_store_memory": 200 << 20}
    ray.init("local", num_cpus=cores + 1, **options)
    return lambda path: _packed(on_ray(_plan(path, base), prepare_rows))


def _plan(path: Path, base: Path) -> DataPlan:
    section = DataSection.model_validate({"sources": [{"path": str(path)}], "max_length": PACK_LENGTH})
    return plan_data(section, base)


def _packed(tables: Iterator[pa.Table]) -> Work:
    """Makes examples and packs of a stream of tables, as the feed of a training run does; keeps lengths alone."""
    lengths: list[int] = []
    window: list[int] = []
    trained = packs = 0
    for table in tables:
        made = examples(table)
        trained += sum(example.trained_tokens for example in made)
        window += [len(example.input_ids) for example in made]
        while len(window) >= WINDOW:
            packs += len(best_fit(window[:WINDOW], PACK_LENGTH))
            lengths += window[:WINDOW]
            window = window[WINDOW:]
    packs += len(best_fit(window, PACK_LENGTH)) if window else 0
    return lengths + window, trained, packs


def peer(cores: int, base: Path) -> Callable[[Path], Work]:
    """The usual path: `datasets.map` with an assistant mask, then TRL's best-fit packing."""
    import datasets
    from transformers import AutoTokenizer
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    # The model's own template, with the marks that the assistant mask needs.
    tokenizer.chat_template = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )

    def tokenise(rows: dict[str, list[Any]]) -> dict[str, Any]:
        inputs = rows.get("input") or [None] * len(rows["output"])
        talks = [
            [
                {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction},
                {"role": "assistant", "content": output},
            ]
            for instruction, context, output in zip(rows["instruction"], inputs, rows["output"], strict=True)
        ]
        made = tokenizer.apply_chat_template(talks, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    def run(path: Path) -> Work:
        read = datasets.Dataset.from_json(str(path), keep_in_memory=False, cache_dir=tempfile.mkdtemp())
        made = read.map(tokenise, batched=True, num_proc=cores, remove_columns=read.column_names)
        lengths = made.with_format("arrow")["input_ids"]
        sizes = [size for chunk in _chunks(lengths) for size in chunk]
        trained = sum(sum(row) for row in made["assistant_masks"])
        packed = pack_dataset(made, PACK_LENGTH, strategy="bfd", map_kwargs={"num_proc": cores})
        return sizes, trained, len(packed)

    return run


def _chunks(column: Any) -> list[list[int]]:
    import pyarrow.compute as pc

    return [pc.list_value_length(column).to_pylist()]


def _one(arguments: argparse.Namespace) -> int:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    run = {"ours": ours, "ray": ray, "peer": peer}[arguments.one](arguments.cores, arguments.base)
    run(arguments.folder / "rows.jsonl")
    with Watch() as watch:
        begin = time.perf_counter()
        lengths, trained, packs = run(arguments.folder / "rows.jsonl")
        seconds = time.perf_counter() - begin
    measured = Measured(
        rows=len(lengths),
        tokens=sum(lengths),
        trained_tokens=trained,
        seconds=seconds,
        rows_per_s=len(lengths) / seconds,
        tokens_per_s=sum(lengths) / seconds,
        peak_bytes=watch.peak_bytes,
        packs=packs,
        packing_efficiency=efficiency(lengths, packs, PACK_LENGTH),
    )
    print(json.dumps(asdict(measured)))
    return 0


def _run(name: str, cores: int, folder: Path, base: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "jobs.bench.data", "--one", name, "--cores", str(cores)]
    done = subprocess.run(
        [*command, "--folder", str(folder), "--base", str(base)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise BenchmarkError(f"{name} failed on {cores} core(s):\n{done.stderr.strip()[-2000:]}")
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    rates = f"{measured['rows_per_s']:>9,.0f} rows/s  {measured['tokens_per_s']:>11,.0f} tokens/s"
    used = f"{measured['peak_bytes'] / 2**20:>6,.0f} MiB  packs {measured['packing_efficiency']:.1%} full"
    print(f"{name:5} {cores} core(s)  {rates}  {used}", flush=True)
    return measured


def _result(runs: dict[tuple[str, int], list[dict[str, Any]]], base: Path) -> dict[str, Any]:
    middle = {
        key: sorted(values, key=lambda measured: measured["seconds"])[len(values) // 2] for key, values in runs.items()
    }
    most = max(cores for _, cores in middle)
    last = {name: middle[name, most] for name in CONTENDERS}
    for field in ("rows", "tokens", "trained_tokens"):
        if len({measured[field] for measured in last.values()}) > 1:
            raise BenchmarkError(
                f"the contenders did not do the same work: {field} {[measured[field] for measured in last.values()]}"
            )
    return {
        "ratio_vs_datasets": last["ours"]["tokens_per_s"] / last["peer"]["tokens_per_s"],
        "ratio_vs_datasets_on_ray": last["ray"]["tokens_per_s"] / last["peer"]["tokens_per_s"],
        "memory_ratio": last["ours"]["peak_bytes"] / last["peer"]["peak_bytes"],
        "memory_ratio_on_ray": last["ray"]["peak_bytes"] / last["peer"]["peak_bytes"],
        "packing_efficiency": {name: last[name]["packing_efficiency"] for name in CONTENDERS},
        "scaling": {name: last[name]["tokens_per_s"] / middle[name, 1]["tokens_per_s"] for name in CONTENDERS},
        "cores": most,
        "runs": {f"{name}-{cores}": values for (name, cores), values in runs.items()},
        "pack_length": PACK_LENGTH,
        "base": base.name,
        "machine": machine(),
        "versions": versions("raysft", "ray", "datasets", "trl", "transformers", "tokenizers", "kitoken", "pyarrow"),
    }


if __name__ == "__main__":
    cli.run(main)
