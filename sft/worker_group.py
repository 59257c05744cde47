"""The worker group of a run: what it is told, its start under Ray Train, and how it ends."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft import storage
from sft.base import BaseTokenizer
from sft.checkpoint import Fingerprints
from sft.cluster import shortage
from sft.config import TrainConfig
from sft.errors import TrainingError
from sft.evaluation import EvaluationPlan
from sft.failures import failures, stop_at_faults, translated, user_fault
from sft.feed import FeedPlan
from sft.listener import Listener
from sft.model import LoraPlan, ModelPlan
from sft.objective import CrossEntropy, Objective, Preference
from sft.report import Reporter
from sft.run import RunFolder, save_json
from sft.selection import Epochs
from sft.start import StartAdapter
from sft.survey import Survey
from sft.train_config import TrainSection
from sft.watch import watch_plan
from sft.worker import WorkerJob, feed_actor, train_worker

Say = Callable[[str], None]

PLACES_S = 10.0
"""How long a group of an elastic run waits for its places.

Right after a node is lost Ray Train may still count it: such a group never gets them, and the next one is smaller.
"""


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run whose data, start and folder are known; its workers have not begun."""

    config: TrainConfig
    epochs: Epochs
    tokenizer: BaseTokenizer
    prints: Fingerprints
    start: StartAdapter | None
    folder: RunFolder
    reporter: Reporter
    evaluation: EvaluationPlan | None
    say: Say


def fit(run: PreparedRun) -> Survey:
    """Runs the worker group to the end of the run.

    Returns:
        What the data held as far as it was read.

    Raises:
        RaysftError: a fault that a user can mend.
        KeyboardInterrupt: the user stopped the run.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    config, epochs, folder, say = run.config, run.epochs, run.folder, run.say
    scaling, workers = config.scaling, config.scaling.workers
    elastic = workers.elastic
    patience = min(PLACES_S, scaling.resource_timeout_s) if elastic else scaling.resource_timeout_s
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(patience)
    # What the workers tell must outlive their nodes.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
    selection = epochs.selection
    limit = config.data.max_bad_fraction if selection is None else None
    feed = feed_actor(epochs, _feed_plan(config, run.tokenizer, selection.examples if selection else None), limit)
    job = WorkerJob(
        model=_model_plan(config, epochs.plan.base, run.start),
        config=config.model_dump(mode="json"),
        deepspeed=config.deepspeed,
        train=config.train,
        plus_ratio=config.lora.plus_ratio,
        save_every=config.checkpoint.every_steps,
        fingerprints=run.prints,
        run_address=folder.address,
        num_to_keep=config.checkpoint.num_to_keep,
        feed=feed,
        reports=reports,
        watch=watch_plan(config.evaluate),
        evaluation=ray.put(run.evaluation) if run.evaluation else None,
        objective=_objective(config),
        start=ray.put(run.start.weights) if run.start else None,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.max) if elastic else workers.max,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,  # type: ignore[call-arg]
            use_gpu=scaling.use_gpu,
            resources_per_worker=worker_resources(config),
            placement_strategy=scaling.placement_strategy,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=folder.address.rsplit("/", 1)[0],
            failure_config=FailureConfig(
                max_failures=config.failure.max_failures,
                controller_failure_limit=_start_limit(config, patience),  # type: ignore[call-arg]
            ),
            callbacks=[stop_at_faults()],
        ),
    )
    say(
        f"training {_length(config.train)} with {config.train.global_batch_size} {_rows(config)} a step "
        f"on {f'{workers.min} to ' if elastic else ''}{workers.max} {'GPU' if scaling.use_gpu else 'CPU'} worker(s), "
        f"ZeRO stage {config.deepspeed.zero_stage}"
    )

    def lacking() -> str | None:
        return shortage(workers.min, worker_resources(config))

    listener = Listener(reports, run.reporter, say, lacking, scaling.resource_timeout_s if elastic else None)
    try:
        trainer.fit()
        if selection is not None:
            counted = selection.survey
        else:
            counted = ray.get(feed.survey.remote())
            save_json(folder.survey, counted.to_dict())
            if counted.refused:
                storage.write(folder.quarantine, counted.quarantine())
            say(told(counted, folder))
    except (SystemExit, KeyboardInterrupt):
        if listener.gave_up:
            raise _no_room(listener.gave_up, config) from None
        say(f"stopping; checkpoints in {folder.address} are whole, and the same command goes on from the last one")
        raise KeyboardInterrupt from None  # Ray Train turns Ctrl-C into SystemExit(0)
    except Exception as error:
        missing = lacking()
        if missing and user_fault(failures(error)) is None:
            raise _no_room(missing, config) from None
        raise translated(error, f"run {config.name} failed") from None
    finally:
        listener.stop()
        ray.kill(feed)
        reports.shutdown(force=True)
        run.reporter.close()
    return counted


def worker_resources(config: TrainConfig) -> dict[str, float]:
    """What Ray keeps for each worker."""
    resources: dict[str, float] = {"CPU": config.scaling.cpus_per_worker}
    if config.scaling.use_gpu:
        resources["GPU"] = 1
    return resources


def told(counted: Survey, folder: RunFolder) -> str:
    """What the data held, in a line."""
    bad, left_out = counted.total.faults.total(), counted.total.excluded.total()
    return (
        f"{counted.kept:,} examples, {counted.tokens:,} tokens, {counted.trained_tokens:,} trained"
        + (f"; {bad:,} of {counted.rows:,} rows quarantined in {folder.quarantine}" if bad else "")
        + (f"; {left_out:,} rows left out as the config asks" if left_out else "")
    )


def _start_limit(config: TrainConfig, patience: float) -> int:
    """How many groups may wait so many seconds for their places in vain before the run fails; -1: any number."""
    allowed, workers = config.failure.max_failures, config.scaling.workers
    if not workers.elastic:
        return max(allowed, 0)
    return allowed if allowed < 0 else allowed + math.ceil(config.scaling.resource_timeout_s / patience)


def _no_room(lacking: str, config: TrainConfig) -> TrainingError:
    return TrainingError(
        f"the workers did not start within {config.scaling.resource_timeout_s:g} s: the run needs {lacking}; "
        "lower scaling.num_workers, use a larger cluster, or raise scaling.resource_timeout_s"
    )


def _rows(config: TrainConfig) -> str:
    """What a row of a step is."""
    return "pairs" if config.on_pairs else {"packed": "packs", "padded": "examples"}[config.train.layout]


def _objective(config: TrainConfig) -> Objective:
    if config.on_pairs:
        return Preference(config.preference.beta, config.preference.label_smoothing)
    return CrossEntropy()


def _length(train: TrainSection) -> str:
    epochs = f"{train.whole_epochs} epoch(s)" if train.whole_epochs else ""
    steps = f"{train.max_steps:,} steps" if train.max_steps else ""
    return f"{epochs}, at most {steps}" if epochs and steps else epochs or steps


def _feed_plan(config: TrainConfig, tokenizer: BaseTokenizer, examples: int | None) -> FeedPlan:
    return FeedPlan(
        seed=config.train.seed,
        shuffle_window=config.data.shuffle_window,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        layout=config.train.layout,
        pad_id=tokenizer.pad_id,
        pack_length=config.data.max_length,
        epoch_examples=examples,
    )


def _model_plan(config: TrainConfig, base: Path, start: StartAdapter | None) -> ModelPlan:
    model, lora = config.model, config.lora
    fresh = LoraPlan(lora.rank, lora.alpha, lora.dropout, lora.target_modules, lora.rslora, lora.dora, lora.init)
    return ModelPlan(
        base=base,
        base_id=model.id,
        dtype=model.dtype,
        quantization=model.quantization,
        attention=model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        lora=start.lora if start else fresh,
        method=config.train.method,
        neftune_alpha=config.train.neftune_alpha,
        reference=config.on_pairs,
    )
