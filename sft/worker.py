"""What runs on Ray's side of training: the feed actor, and the function that every Ray Train worker runs."""

from __future__ import annotations

import itertools
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft.batch import WorkerBatch, accumulation_steps
from sft.checkpoint import Fingerprints, RunState, read_metrics, read_parameters
from sft.checkpoint_store import CheckpointStore
from sft.config import DeepSpeedSection
from sft.data import epoch_on_ray
from sft.engine import Engine, EnginePlan
from sft.errors import DataError, RaysftError, StorageError
from sft.evaluation import Evaluation, Evaluator
from sft.feed import BatchFeed, FeedPlan
from sft.listener import Notice, Started
from sft.loop import BadStep, LoopPlan, StepReport, run_loop
from sft.mask import Example
from sft.model import LossModel, ModelPlan, build_model, peft_config
from sft.objective import Objective
from sft.process_group import join_workers
from sft.report import metrics_line
from sft.rows import examples
from sft.run import save_json
from sft.schedule import Cosine
from sft.selection import Epochs
from sft.survey import Survey
from sft.train_config import TrainSection
from sft.watch import Measured, Watch, WatchPlan

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
    plus_ratio: float
    save_every: int | None
    fingerprints: Fingerprints
    run_address: str
    num_to_keep: int | None
    feed: Any
    reports: Any
    watch: WatchPlan | None
    evaluation: Any
    """Reference to the EvaluationPlan, whose many rows each node fetches once."""
    objective: Objective
    start: Any
    """Reference to the weights that the adapter starts from; None for a fresh one."""


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
    from transformers.utils import logging as transformers_logging

    device = get_device()
    os.environ["DS_ACCELERATOR"] = device.type  # else DeepSpeed guesses, and says so
    transformers_logging.disable_progress_bar()
    job: WorkerJob = loop_config["job"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    if rank == 0:
        job.reports.put(Started(workers))
    join_workers(device.type)
    torch.manual_seed(job.train.seed)
    start_weights = None if job.start is None else ray.get(job.start)
    model = build_model(job.model, device=device, start=start_weights)
    engine = Engine(model, _engine_plan(job, workers), workers=workers, device=device)
    store = CheckpointStore(job.run_address)
    start = _resume(job, store, engine, rank)
    if start.finished:
        return
    metrics = [start.metrics]
    watch = _watch(job, store, engine, model, start, metrics, rank)
    if watch is not None and not watch.history and start.step == 0:
        watch.before()

    def report(done: StepReport) -> None:
        if rank == 0:
            metrics.append(metrics_line(done).encode())
            job.reports.put(done)

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
            on_bad_loss=job.train.on_bad_loss,
        ),
        _batches(job, start, rank, workers),
        rank=rank,
        start=start.step,
        skipped=start.skipped,
        report=report,
        save=lambda batch, done, last: _save(
            job,
            store,
            engine,
            model,
            _run_state(job, batch, done, last, watch.history if watch else ()),
            metrics,
            rank,
        ),
        bad=lambda step: _keep_bad(job, step, rank),
        watch=watch.after if watch else lambda *_: False,
        objective=job.objective,
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """Finished steps, those of them that were left out, the next step to train by its epoch and its number in it, what
    there is to tell of the finished ones, and their held-out losses.
    """

    step: int = 0
    skipped: int = 0
    epoch: int = 0
    epoch_step: int = 0
    finished: bool = False
    metrics: bytes = b""
    history: tuple[Measured, ...] = ()


def _watch(
    job: WorkerJob,
    store: CheckpointStore,
    engine: Engine,
    model: LossModel,
    start: _Start,
    metrics: list[bytes],
    rank: int,
) -> Watch | None:
    """What evaluates the run, where the config asks for it."""
    import ray

    if job.watch is None:
        return None

    def keep(batch: WorkerBatch, done: StepReport, history: tuple[Measured, ...]) -> None:
        state = engine.state(keep=rank == 0)
        if rank == 0:
            run = _run_state(job, batch, done, False, history)
            store.keep_best(run, state, peft_config(model), b"".join(metrics))

    def tell(evaluation: Evaluation) -> None:
        if rank == 0:
            job.reports.put(evaluation)

    evaluate = Evaluator(engine, ray.get(job.evaluation), rank, job.objective)
    return Watch(job.watch, evaluate, tell=tell, keep=keep, history=start.history)


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


def _resume(job: WorkerJob, store: CheckpointStore, engine: Engine, rank: int) -> _Start:
    """Puts back the newest whole checkpoint if there is one; returns where to go on."""
    with tempfile.TemporaryDirectory(prefix="raysft-resume-") as work:
        found = None
        chosen: list[str | RaysftError | None] = [None]
        if rank == 0:
            try:
                found = store.newest(job.fingerprints, job.config, Path(work), lambda text: _tell(job, text))
                chosen = [found.name if found else None]
            except RaysftError as error:
                chosen = [error]
        if engine.workers > 1:
            dist.broadcast_object_list(chosen, src=0)
        if isinstance(chosen[0], RaysftError):
            raise chosen[0]
        if chosen[0] is None:
            return _Start()
        found = found or store.fetch(chosen[0], Path(work))
        run = found.run
        if not run.finished:
            engine.load_state(read_parameters(found.folder), run.step - run.skipped)
        if rank == 0:
            _tell(job, f"going on after step {run.step}")
        return _Start(
            run.step, run.skipped, run.epoch, run.epoch_step, run.finished, read_metrics(found.folder), run.history
        )


def _tell(job: WorkerJob, text: str) -> None:
    job.reports.put(Notice(text))


def _run_state(
    job: WorkerJob, batch: WorkerBatch, done: StepReport, last: bool, history: tuple[Measured, ...]
) -> RunState:
    return RunState(
        step=done.step,
        epoch=batch.epoch,
        epoch_step=batch.step + 1,
        seed=job.train.seed,
        fingerprints=job.fingerprints,
        config=job.config,
        skipped=done.skipped,
        finished=last,
        history=history,
    )


def _save(
    job: WorkerJob,
    store: CheckpointStore,
    engine: Engine,
    model: LossModel,
    run: RunState,
    metrics: list[bytes],
    rank: int,
) -> None:
    """Keeps a checkpoint; every worker takes part, worker 0 writes."""
    import ray.train

    state = engine.state(keep=rank == 0)
    if rank == 0:
        store.keep(run, state, peft_config(model), b"".join(metrics), job.num_to_keep)
    # Nobody trains on before the checkpoint is there. Ray need not know it: the run's folder is the record.
    ray.train.report({"step": run.step})


def _keep_bad(job: WorkerJob, step: BadStep, rank: int) -> str:
    """Writes what is known of a bad step; returns where."""
    address = f"{job.run_address}/bad-step-{step.step}.json"
    if rank == 0:
        # JSON has no NaN.
        told = {**asdict(step), "loss": str(step.loss), "grad_norm": str(step.grad_norm)}
        try:
            save_json(address, told)
        except StorageError as error:
            address = f"no file: {error}"
        if job.train.on_bad_loss == "skip":
            what = f"loss {step.loss} and gradient norm {step.grad_norm}"
            _tell(job, f"warning: step {step.step} left out for its {what}; the ids of its rows: {address}")
    return address


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
        plus_ratio=job.plus_ratio,
    )
