"""`python -m jobs.bench.train_step`: one process's LoRA step on whatever accelerator is there, without Ray.

The model has a published shape and random weights, so nothing is downloaded; packs are full and every token is
trained unless `--trained` says otherwise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jobs import cli
from jobs.bench.machine import Watch, machine, versions
from jobs.bench.train_work import flop_of, matrix_rate, packed_batches

DESCRIPTION = """Measure one training step of a model of a published shape with random weights: tokens a second, peak
memory, share of the device's matrix rate. Writes JSON.
"""
WARM_STEPS = 2

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "model_type": "llama",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "llama-3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
"""The numbers that the models' own configs publish, as far as the cost of a step depends on them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and writes the figures."""
    parser = argparse.ArgumentParser(prog="python -m jobs.bench.train_step", description=DESCRIPTION)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m", help="the model (default: smollm2-135m)")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a pack (default: 4096)")
    parser.add_argument("--documents", type=int, default=1, help="documents of a pack (default: 1)")
    parser.add_argument("--packs", type=int, default=1, help="packs a step, one after the other (default: 1)")
    parser.add_argument("--steps", type=int, default=5, help=f"steps after {WARM_STEPS} that warm up (default: 5)")
    parser.add_argument("--trained", type=float, default=1.0, help="share of a document that is trained (default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapter on all linear layers (default: 16)")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again, keep none")
    parser.add_argument("--out", type=Path, default=Path("build/bench/train_step.json"), help="where to write")
    arguments = parser.parse_args(argv)
    with Watch() as watch:
        result = measure(arguments)
    result.setdefault("peak_bytes", watch.peak_bytes)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        f"{arguments.shape} on {result['device']}: {result['tokens_per_s']:,.0f} tokens/s, "
        f"{result['share_of_matrix_rate']:.1%} of the matrix rate, {result['peak_bytes'] / 2**30:.2f} GiB"
    )
    print(f"figures in {arguments.out}")
    return 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the steps; returns the figures."""
    import torch

    from jobs.bench.train_contenders import one_process
    from sft.engine import Engine, EnginePlan
    from sft.loop import LoopPlan, run_loop
    from sft.model import trained_parameters
    from sft.schedule import Cosine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rates = matrix_rate(torch.get_num_threads(), device.type)
    one_process(device.type)
    model, config, attention = random_model(arguments, device)
    dtype = next(parameter.dtype for parameter in model.parameters() if not parameter.requires_grad)
    plan = EnginePlan(0, False, False, 1, arguments.packs, 1e-4, (0.9, 0.999), 0.0, 1.0)
    engine = Engine(model, plan, workers=1, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    count = WARM_STEPS + arguments.steps
    ends: list[float] = []
    losses: list[float] = []

    def report(done: Any) -> None:
        ends.append(time.perf_counter())
        losses.append(done.loss)

    loop = LoopPlan(None, count, Cosine(1e-4, 1e-4, 0.0), 0, None)
    steps = _steps(arguments, config.vocab_size, count)
    batches = packed_batches(steps, count, micro_batch_size=1, accumulation=arguments.packs)
    run_loop(engine, loop, batches, rank=0, start=0, report=report, save=lambda *_: None, bad=lambda _: "no file")
    seconds = [after - before for before, after in itertools.pairwise(ends[WARM_STEPS - 1 :])]
    rate = arguments.length * arguments.packs / statistics.median(seconds)
    name = str(dtype).removeprefix("torch.")
    flop = flop_of(config, arguments.trained)
    return {
        "tokens_per_s": rate,
        "tflop_per_s": rate * flop / 1e12,
        "share_of_matrix_rate": rate * flop / (rates[name] * 1e9),
        **({"peak_bytes": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}),
        "step_s": seconds,
        "losses": losses,
        "gflop_per_token": flop / 1e9,
        "matrix_gflop_per_s": rates,
        "precision": name,
        "attention": attention,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trained_parameters(model).values()),
        **{key: value for key, value in vars(arguments).items() if key != "out"},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else machine()["cpu"],
        "machine": machine(),
        "versions": versions(
            "raysft", "torch", "transformers", "peft", "deepspeed", "flash-attn", "liger-kernel", "triton"
        ),
    }


def random_model(arguments: argparse.Namespace, device: Any) -> tuple[Any, Any, str]:
    """Makes the model with random weights where it will run, in the type that the device multiplies best.

    Returns:
        The loss model, its config, and the attention it uses.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import is_flash_attn_2_available

    from sft.model import LoraPlan, ModelPlan, build_model, resolve_dtype

    shape = {**SHAPES[arguments.shape], "max_position_embeddings": arguments.length}
    config: Any = AutoConfig.for_model(**shape)
    attention = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "sdpa"
    lora = LoraPlan(arguments.rank, 2.0 * arguments.rank, 0.0, "all-linear")
    plan = ModelPlan(Path(arguments.shape), arguments.shape, "auto", "none", attention, arguments.checkpointing, lora)
    torch.manual_seed(0)
    with torch.device(device):
        base: Any = AutoModelForCausalLM.from_config(
            config, dtype=resolve_dtype("auto", device), attn_implementation=attention
        )
        return build_model(plan, device=device, base=base), config, attention


def _steps(arguments: argparse.Namespace, vocabulary: int, count: int) -> Iterator[list[list[Any]]]:
    """Full packs of random tokens, step by step."""
    import numpy as np

    from sft.mask import UNTRAINED, Example

    draw = np.random.default_rng(0)
    edges = np.linspace(0, arguments.length, arguments.documents + 1).astype(int)
    for _ in range(count):
        packs = []
        for _ in range(arguments.packs):
            pack = []
            for length in np.diff(edges).tolist():
                ids = draw.integers(0, vocabulary, length).astype(np.int32)
                labels = ids.copy()
                labels[: max(1, round(length * (1 - arguments.trained)))] = UNTRAINED
                pack.append(Example("random", ids, labels))
            packs.append(pack)
        yield packs


if __name__ == "__main__":
    cli.run(main)
