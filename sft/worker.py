"""What runs on Ray's side of training: the feed actor, and the function that every Ray Train worker runs."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import storage
from sft.batch import WorkerBatch, accumulation_steps
from sft.best import put_best, remove_former
from sft.checkpoint import MANIFEST, Fingerprints, RunState, read_parameters, verify_checkpoint, write_checkpoint
from sft.config import DeepSpeedSection, TrainSection
from sft.data import epoch_on_ray
from sft.engine import Engine, EnginePlan
from sft.errors import CheckpointError, DataError
from sft.evaluation import Evaluation, Evaluator
from sft.feed import BatchFeed, FeedPlan
from sft.loop import LoopPlan, StepReport, run_loop
from sft.mask import Example
from sft.model import LossModel, ModelPlan, build_model, peft_config
from sft.rows import examples
from sft.schedule import Cosine
from sft.selection import Epochs
from sft.survey import Survey
from sft.watch import Watch, WatchPlan

PREFETCH = 2
"""Batches that a worker asks for ahead of the one that it computes."""


CHECKED_FROM = 1000
"""Rows from which the share of bad ones says something of the rest."""


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """All that a worker needs; the same for every worker, whatever their number."""

    model: ModelPlan
    config: dict[str, Any]
    deepspeed: DeepSpeedSection
    train: TrainSection
    save_every: int | None
    fingerprints: Fingerprints
    run_address: str
    feed: Any
    reports: Any
    watch: WatchPlan | None = None
    evaluation: Any = None  # an object reference: many rows, fetched once a node


def feed_actor(epochs: Epochs, feed: FeedPlan, max_bad_fraction: float | None) -> Any:
    """Starts the actor that serves global batches. It holds no position, so it may be restarted at any time.

    Args:
        epochs: what to read, in which order.
        feed: how it becomes batches.
        max_bad_fraction: share of bad rows at which reading fails, for data that was not counted before.
    """
    import ray

    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(StreamFeed)
    return actor.remote(epochs, feed, max_bad_fraction)


class StreamFeed(BatchFeed):
    """Global batches of a data set that is read as they are asked for."""

    def __init__(self, epochs: Epochs, feed: FeedPlan, max_bad_fraction: float | None) -> None:
        super().__init__(self._read, feed)
        self._epochs = epochs
        self._limit = max_bad_fraction
        self._counted = Survey()

    def survey(self) -> Survey:
        """What the epoch held that was read last, as far as it was read."""
        return self._counted

    def _read(self, epoch: int) -> Iterator[Example]:
        self._counted = Survey()
        for table in epoch_on_ray(self._epochs.plan, self._epochs.order(epoch), self._epochs.draw(epoch)):
            if self._limit is not None:
                self._counted.add(table)
                if self._counted.rows >= CHECKED_FROM:
                    self._counted.check(self._limit)
            yield from examples(table)


def train_worker(loop_config: dict[str, Any]) -> None:
    """One Ray Train worker, from its first import to its last checkpoint."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    device = get_device()
    os.environ["DS_ACCELERATOR"] = device.type  # else DeepSpeed guesses, and says so
    import deepspeed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    job: WorkerJob = loop_config["job"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    deepspeed.init_distributed(dist_backend="nccl" if device.type == "cuda" else "gloo", auto_mpi_discovery=False)
    torch.manual_seed(job.train.seed)
    model = build_model(job.model, device=device)
    engine = Engine(model, _engine_plan(job, workers), workers=workers, device=device)
    start = _resume(job, engine)
    watch = _watch(job, engine, model, start, rank)
    if watch is not None:
        if watch.stopped:  # before the run was interrupted
            return
        if not watch.history and start.step == 0:
            watch.before()
    run_loop(
        engine,
        LoopPlan(
            epochs=job.train.whole_epochs,
            max_steps=job.train.max_steps,
            schedule=Cosine(
                peak=job.train.learning_rate, floor=job.train.min_learning_rate, warmup=job.train.warmup_ratio
            ),
            seed=job.train.seed,
            save_every=job.save_every,
        ),
        _batches(job, start, rank, workers),
        rank=rank,
        start=start.step,
        report=job.reports.put if rank == 0 else _nothing,
        save=lambda batch, report: _save(job, engine, model, batch, report, rank, watch.history if watch else ()),
        watch=watch.after if watch else lambda *_: False,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """Finished steps, and the next step to train by its epoch and its number in it."""

    step: int
    epoch: int
    epoch_step: int
    history: tuple[tuple[int, float], ...] = ()


def _watch(job: WorkerJob, engine: Engine, model: LossModel, start: _Start, rank: int) -> Watch | None:
    """What evaluates the run, where the config asks for it."""
    import ray

    if job.watch is None:
        return None

    def keep(batch: WorkerBatch, report: StepReport, history: tuple[tuple[int, float], ...]) -> None:
        state = engine.state()
        if rank == 0:
            with tempfile.TemporaryDirectory(prefix="raysft-best-") as folder:
                write_checkpoint(Path(folder), _run_state(job, batch, report, history), state, peft_config(model))
                put_best(Path(folder), job.run_address, report.step)

    evaluate = Evaluator(engine, ray.get(job.evaluation), rank)
    tell = job.reports.put if rank == 0 else _nothing
    return Watch(job.watch, evaluate, tell=tell, keep=keep, history=start.history)


def _run_state(
    job: WorkerJob, batch: WorkerBatch, report: StepReport, history: tuple[tuple[int, float], ...]
) -> RunState:
    return RunState(report.step, batch.epoch, batch.step + 1, job.train.seed, job.fingerprints, job.config, history)


def _batches(job: WorkerJob, start: _Start, rank: int, workers: int) -> Iterator[WorkerBatch]:
    """This worker's shares in order, epoch after epoch without end, asked for ahead of time."""
    import ray

    first = start.epoch_step
    for epoch in itertools.count(start.epoch):
        found = first > 0
        asked: deque[Any] = deque()
        for step in itertools.count(first):
            asked.append(job.feed.share.remote(epoch, step, rank, workers))
            if len(asked) > PREFETCH:
                batch: WorkerBatch | None = ray.get(asked.popleft())
                if batch is None:
                    break
                yield batch
                found = True
        if not found:
            raise DataError(f"epoch {epoch} holds no example; keep the files unchanged during a run")
        first = 0


def _resume(job: WorkerJob, engine: Engine) -> _Start:
    """Puts back the last checkpoint if there is one; returns where to go on."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return _Start(0, 0, 0)
    with checkpoint.as_directory() as local:
        run = verify_checkpoint(Path(local))
        if run.fingerprints != job.fingerprints:
            raise CheckpointError(
                f"{checkpoint.path} belongs to another run: its base model, chat template or data differ; "
                "choose another `name`, or take the data back"
            )
        engine.load_state(read_parameters(Path(local)), run.step)
    return _Start(run.step, run.epoch, run.epoch_step, run.history)


def _save(
    job: WorkerJob,
    engine: Engine,
    model: LossModel,
    batch: WorkerBatch,
    report: StepReport,
    rank: int,
    history: tuple[tuple[int, float], ...],
) -> None:
    """Saves a checkpoint; every worker takes part, worker 0 writes."""
    import ray.train

    state = engine.state()
    step = report.step
    metrics = {"step": step, "loss": report.loss}
    if rank != 0:
        ray.train.report(metrics, checkpoint=None)
        return
    run = _run_state(job, batch, report, history)
    with tempfile.TemporaryDirectory(prefix="raysft-checkpoint-") as folder:
        write_checkpoint(Path(folder), run, state, peft_config(model))
        ray.train.report(
            metrics,
            checkpoint=ray.train.Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"checkpoint-{step:08d}-{os.getpid()}",
            checkpoint_upload_fn=lambda made, name: _upload(job, made, name),
        )
    remove_former(job.run_address, run)


def _upload(job: WorkerJob, made: Any, name: str) -> Any:
    """Copies a checkpoint to the run's storage with its manifest last, so that half a copy never looks whole."""
    import ray.train

    address = f"{job.run_address}/{name}"
    storage.upload(Path(made.path), address, last=MANIFEST)
    return ray.train.Checkpoint(address)


def _engine_plan(job: WorkerJob, workers: int) -> EnginePlan:
    train, zero = job.train, job.deepspeed
    return EnginePlan(
        zero_stage=zero.zero_stage,
        offload_optimizer=zero.offload_optimizer,
        offload_parameters=zero.offload_parameters,
        micro_batch_size=train.micro_batch_size,
        accumulation=accumulation_steps(train.global_batch_size, workers, train.micro_batch_size),
        learning_rate=train.learning_rate,
        betas=train.betas,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )


def _nothing(_: StepReport | Evaluation) -> None:
    return None
