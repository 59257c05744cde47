"""The contenders of `python -m jobs.bench.train`: each trains the same rows, step by step, and tells times and losses.

All start from the same adapter, in the same precision, with AdamW at a constant rate and gradients clipped at 1. One
optimizer step holds the same examples for everyone; what differs is how they are laid out and computed.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from jobs.bench.machine import BenchmarkError
from jobs.bench.train_rows import PACK_LENGTH, PACKS_A_STEP, SEED, Workload, data_section
from jobs.bench.train_work import packed_batches

RATE = 1e-3
RANK, ALPHA = 16, 32.0
ADAPTER = "adapter.safetensors"
KILL_AFTER = 3


@dataclass
class Told:
    """What a contender tells: the end of every step by the wall clock, and its loss per trained token."""

    ends: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    first_begin: float = 0.0
    recover_s: float | None = None

    def step(self, loss: float) -> None:
        """Notes that a step has ended."""
        self.ends.append(time.time())
        self.losses.append(loss)

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


Contender = Callable[[Workload, Path, Path, int], Told]
"""Trains a workload: the base's folder, a folder with the first adapter to leave the last one in, the cores."""


def model_plan(base: Path) -> Any:
    """The model that all train."""
    from sft.model import LoraPlan, ModelPlan

    return ModelPlan(base, base.name, "auto", "none", "sdpa", False, LoraPlan(RANK, ALPHA, 0.0, "all-linear"))


def first_adapter(base: Path, path: Path) -> None:
    """Writes the adapter that all start from: the one that a run of ours makes of its seed."""
    import torch
    from safetensors.torch import save_file

    from sft.model import build_model, trained_parameters

    torch.manual_seed(SEED)
    save_file(
        {name: value.data.contiguous() for name, value in trained_parameters(build_model(model_plan(base))).items()},
        path,
    )


def ours(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """Our loop in one process: no Ray, no other worker, and all packs of a step in one pass."""
    import torch

    from sft.engine import Engine, EnginePlan
    from sft.loop import LoopPlan, run_loop
    from sft.model import build_model
    from sft.schedule import Cosine

    one_process("cpu")
    torch.manual_seed(SEED)
    plan = EnginePlan(0, False, False, PACKS_A_STEP, 1, RATE, (0.9, 0.999), 0.0, 1.0)
    engine = Engine(build_model(model_plan(base)), plan, workers=1, device=torch.device("cpu"))
    count = len(work.steps)
    told = Told(first_begin=time.time())
    loop = LoopPlan(None, count, Cosine(RATE, RATE, 0.0), SEED, None)
    run_loop(
        engine,
        loop,
        packed_batches(work.steps, count, micro_batch_size=PACKS_A_STEP, accumulation=1),
        rank=0,
        start=0,
        report=lambda report: told.step(report.loss),
        save=lambda *_: _keep(engine.module, folder),
        bad=lambda _: "no file",
    )
    return told


def trainer(work: Workload, base: Path, folder: Path, cores: int) -> Told:
    """Our whole trainer on Ray, from its config, with as many workers as cores."""
    import shutil

    from sft.trainer import train

    result = train(_config(base, folder, cores, len(work.steps)), say=_hush)
    shutil.copy(result.bundle / "adapter_model.safetensors", folder / ADAPTER)
    reports = [json.loads(line) for line in Path(result.folder.metrics).read_text().splitlines()]
    if [report["tokens"] for report in reports] != work.tokens:
        raise BenchmarkError("the trainer on Ray trained other rows than the workload's")
    told = Told(first_begin=0.0)
    for report in reports:
        told.ends.append((told.ends[-1] if told.ends else 0.0) + report["seconds"])
        told.losses.append(report["loss"])
    return told


def recovery(_: Workload, base: Path, folder: Path, cores: int) -> Told:
    """Our trainer again: one worker is killed after a few steps, and the clock runs until the next step has ended."""
    from sft.trainer import train

    config = _config(base, folder, cores, KILL_AFTER + 2, every_steps=1)
    told = Told()
    done = threading.Event()
    watcher = threading.Thread(target=_kill_one, args=(Path(config.storage) / config.name, told, done), daemon=True)
    watcher.start()
    train(config, say=_hush)
    done.set()
    watcher.join()
    if told.recover_s is None:
        raise BenchmarkError("no step ended after the worker was killed")
    return told


def plain(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """A plain PyTorch and PEFT loop: a step's examples padded to one batch, the model's own loss."""
    import torch

    from sft.batch import collate

    model = _peft_model(base, folder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    told = Told(first_begin=time.time())
    model.train()
    for step in work.steps:
        batch = collate([example for pack in step for example in pack], "padded", 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=_bfloat16(model)):
            loss = model(
                input_ids=torch.tensor(batch.input_ids),
                attention_mask=torch.tensor(batch.attention_mask),
                labels=torch.tensor(batch.labels),
                use_cache=False,
            ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        told.step(loss.item())
    _keep(model, folder)
    return told


def trl_padded(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """TRL with padding, activations kept (`gradient_checkpointing` off), as in our run."""
    return _trl(work, base, folder, packed=False, checkpointing=False)


def trl_packed(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """TRL with packing, activations kept, as in our run."""
    return _trl(work, base, folder, packed=True, checkpointing=False)


def trl_padded_default(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """TRL with padding as it comes: with gradient checkpointing."""
    return _trl(work, base, folder, packed=False, checkpointing=True)


def trl_packed_default(work: Workload, base: Path, folder: Path, _: int) -> Told:
    """TRL with packing as it comes: with gradient checkpointing."""
    return _trl(work, base, folder, packed=True, checkpointing=True)


CONTENDERS: dict[str, Contender] = {
    "ours": ours,
    "trainer": trainer,
    "trl_padded": trl_padded,
    "trl_packed": trl_packed,
    "plain": plain,
    "trl_padded_default": trl_padded_default,
    "trl_packed_default": trl_packed_default,
}


def _trl(work: Workload, base: Path, folder: Path, *, packed: bool, checkpointing: bool) -> Told:
    """TRL's SFTTrainer on rows that are tokenised and masked already; only its sampler is replaced, by our order."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    # A row is what TRL's own packing makes: examples one after the other, and their lengths.
    steps = [step if packed else [[example] for pack in step for example in pack] for step in work.steps]
    rows = [
        {
            "input_ids": [int(token) for example in row for token in example.input_ids],
            "labels": [int(label) for example in row for label in example.labels],
            **({"seq_lengths": [len(example.input_ids) for example in row]} if packed else {}),
        }
        for step in steps
        for row in step
    ]
    numbers = iter(range(len(rows)))
    order = [[next(numbers) for _ in step] for step in steps]
    model = _peft_model(base, folder)
    told = Told()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            told.first_begin = time.time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            told.ends.append(time.time())

    class InOurOrder(SFTTrainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return DataLoader(self.train_dataset, batch_sampler=order, collate_fn=self.data_collator)

    trainer = InOurOrder(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(base),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_length=PACK_LENGTH,
            packing=packed,
            dataset_kwargs={"skip_prepare_dataset": True},
            gradient_checkpointing=checkpointing,
            max_steps=len(steps),
            learning_rate=RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            optim="adamw_torch",
            bf16=_bfloat16(model),
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=SEED,
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    told.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    _keep(model, folder)
    return told


def held_out_loss(work: Workload, base: Path, adapter: Path) -> float:
    """Mean cross-entropy per trained token of the rows that nobody trained, by one and the same code for all."""
    import torch
    from safetensors.torch import load_file

    from sft.batch import collate
    from sft.model import build_model, trained_parameters

    model = build_model(model_plan(base)).eval()
    own = trained_parameters(model)
    total = 0.0
    with torch.no_grad():
        for name, value in load_file(adapter).items():
            own[name].copy_(value)
        for pack in work.held_out:
            batch = collate(pack, "packed", 0)
            total += model(*(torch.tensor(a) for a in (batch.input_ids, batch.labels, batch.position_ids))).item()
    return total / sum(example.trained_tokens for pack in work.held_out for example in pack)


def _peft_model(base: Path, folder: Path) -> Any:
    """The base with a LoRA adapter by PEFT alone, holding the first adapter's values."""
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from sft.model import resolve_dtype

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=resolve_dtype("auto", torch.device("cpu")))
    lora = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    made: Any = get_peft_model(model, lora)
    set_peft_model_state_dict(made, load_file(folder.parent / "first.safetensors"))
    return made


def _keep(model: Any, folder: Path) -> None:
    """Leaves the adapter's values under the names of an adapter file."""
    from safetensors.torch import save_file

    values = {
        name.removeprefix("model.base_model.").removeprefix("base_model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    save_file({f"base_model.{name}": v.detach().float().contiguous() for name, v in values.items()}, folder / ADAPTER)


def _bfloat16(model: Any) -> bool:
    import torch

    return bool(model.dtype == torch.bfloat16)


def one_process(device: str) -> None:
    """Starts a process group of one, which DeepSpeed asks for; `device` is cpu or cuda."""
    from tempfile import mkdtemp

    os.environ |= {"DS_ACCELERATOR": device, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    import torch.distributed as dist

    from sft.process_group import join_workers

    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{mkdtemp()}/meeting", rank=0, world_size=1)
    join_workers(device)


def _config(base: Path, folder: Path, cores: int, steps: int, every_steps: int | None = None) -> Any:
    from sft.config import TrainConfig

    return TrainConfig.model_validate(
        {
            "name": "bench",
            "storage": str(folder / "runs"),
            "model": {"base": str(base)},
            "lora": {"rank": RANK, "alpha": ALPHA},
            "data": data_section().model_dump(mode="json"),
            "train": {
                "max_steps": steps,
                "global_batch_size": PACKS_A_STEP,
                "micro_batch_size": 1,
                "learning_rate": RATE,
                "min_learning_rate": RATE,
                "warmup_ratio": 0.0,
                "seed": SEED,
            },
            "scaling": {"num_workers": min(cores, PACKS_A_STEP)},
            "failure": {"max_failures": 1},
            "checkpoint": {"every_steps": every_steps},
            "ray": {"num_cpus": cores + 4},
        }
    )


def _kill_one(run: Path, told: Told, done: threading.Event) -> None:
    """Kills a worker once the run has made its first steps, and waits for the step after."""
    metrics = run / "metrics.jsonl"
    killed_at: float | None = None
    seen = 0
    while not done.wait(0.02):
        lines = metrics.read_text().count("\n") if metrics.exists() else 0
        if killed_at is None and lines >= KILL_AFTER:
            workers = [
                child
                for child in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join(child.cmdline())
            ]
            if not workers:
                raise BenchmarkError("no training worker to kill was found")
            os.kill(workers[0].pid, signal.SIGKILL)
            killed_at, seen = time.time(), lines
        elif killed_at is not None and lines > seen:
            told.recover_s = time.time() - killed_at
            return


def _hush(_: str) -> None:
    return None
