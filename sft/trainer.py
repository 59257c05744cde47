"""The driver: data sets + TorchTrainer -> an adapter bundle, or a model folder where no bundle can hold the result."""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sft import storage
from sft.adapter import base_fingerprint, verify_bundle
from sft.base import BaseTokenizer, locate, read_template
from sft.checkpoint import Fingerprints, read_metrics
from sft.checkpoint_store import CheckpointStore
from sft.cluster import connect, shortage
from sft.config import TrainConfig
from sft.data import DataPlan, here, on_ray, plan_data, prepare_rows
from sft.ending import ending
from sft.errors import ConfigError, TrainingError
from sft.evaluation import EvaluationPlan
from sft.evaluation_rows import plan_evaluation
from sft.failures import failures, stop_at_faults, translated, translating, user_fault
from sft.feed import FeedPlan
from sft.listener import Listener
from sft.model import LoraPlan, ModelPlan
from sft.model_folder import MANIFEST as MODEL_MANIFEST
from sft.model_folder import verify_model
from sft.objective import CrossEntropy, Objective, Preference
from sft.product import make_product
from sft.report import Reporter, clock
from sft.run import RunFolder, fetch_bundle, fetch_model, open_run, save_json
from sft.selection import Epochs, Selection, needs_all_rows, select
from sft.start import StartAdapter, start_of
from sft.survey import Survey, survey
from sft.trackers import check_installed, trackers
from sft.train_config import TrainSection
from sft.watch import watch_plan
from sft.worker import WorkerJob, feed_actor, train_worker

Say = Callable[[str], None]

LOOKED_AT = 1000
"""Rows that are checked before the workers of a run that does not count its data first are started."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run.

    Rule: `bundle` is a verified adapter bundle on local disk, or, where `TrainConfig.makes_model`, a verified model
    folder; `tokens_per_s` counts all tokens over the time of the steps alone, in the run that made the bundle;
    `seconds` is all the time that this call took.
    """

    bundle: Path
    folder: RunFolder
    steps: int
    loss: float
    tokens_per_s: float
    trained_tokens_per_s: float
    seconds: float
    reused: bool


def train(config: TrainConfig, say: Say = print, *, adapter: Path | None = None) -> TrainingResult:
    """Runs a training run to its end, or takes the result of the finished run of this name.

    Args:
        config: the run.
        say: prints a line.
        adapter: folder of the bundle that `model.adapter` names, where that is a registry's version.

    Raises:
        RaysftError: a fault that a user can mend; nothing half-written looks whole.
        KeyboardInterrupt: the user stopped the run; the last checkpoint is good.
    """
    begin = time.perf_counter()
    base = locate(config.model.base)
    check_installed(config.tracking)
    template = read_template(config.model.chat_template)
    plan = plan_data(config.data, base, template, config.evaluate.share, pairs=config.on_pairs)
    tokenizer = plan.tokenizer()
    folder = open_run(config)
    what, kept = ("model", folder.model) if config.makes_model else ("bundle", folder.bundle)
    finished = fetch_model(folder) if config.makes_model else fetch_bundle(folder)
    if finished is not None:
        say(f"run {config.name} is finished already; taking its {what} from {kept}")
        return _result(finished, folder, time.perf_counter() - begin, reused=True)
    start = start_of(config, base, tokenizer.template.fingerprint, adapter)
    scaling = config.scaling
    started = connect(
        config.ray.address,
        num_cpus=config.ray.num_cpus,
        needed_cpus=scaling.workers.max * scaling.cpus_per_worker + 2,
    )
    lacking = shortage(scaling.workers.min, _worker_resources(config))
    if lacking and started:
        raise ConfigError("scaling", [f"the run needs {lacking}; lower scaling.num_workers or raise ray.num_cpus"])
    if lacking:
        say(f"the run needs {lacking}; waiting for more, at most {scaling.resource_timeout_s:g} s")
    selection = None
    if config.train.whole_epochs or needs_all_rows(config.data):
        selection = _select(plan, folder, config, say)
    else:
        _look(plan, config, say)
    data = selection.survey.fingerprint if selection else plan.fingerprint
    prints = Fingerprints(
        base_fingerprint(base), tokenizer.template.fingerprint, data, start.fingerprint if start else ""
    )
    evaluation = _evaluation(plan, template, config, say)
    tracked = trackers(config.tracking, config.name, folder.address, config.model_dump(mode="json"), say)
    decode = functools.partial(tokenizer.tokenizer.decode, skip_special_tokens=True)
    reporter = Reporter(folder.metrics, say, evaluations=folder.evaluations, decode=decode, trackers=tracked)
    epochs = Epochs(selection.plan if selection else plan, config.train.seed, selection)
    with ending(folder, tracked, say), tempfile.TemporaryDirectory(prefix="raysft-run-") as work:
        made = _train(config, epochs, tokenizer, prints, start, folder, reporter, evaluation, say, Path(work))
    seconds = time.perf_counter() - begin
    say(f"trained in {clock(seconds)}; {what} in {kept}")
    return _result(made, folder, seconds, reused=False)


def _select(plan: DataPlan, folder: RunFolder, config: TrainConfig, say: Say) -> Selection:
    say(f"reading {len(plan.files)} file(s), masking with the chat template of {config.model.id}")
    with translating("the data could not be prepared"), storage.write_late(folder.quarantine) as quarantine:
        selection = select(config.data, plan, on_ray, quarantine)
    save_json(folder.survey, {**selection.survey.to_dict(), "hold_out": selection.hold_out.to_dict()})
    say(_told(selection.survey, folder))
    if selection.mixed:
        say(f"an epoch holds {selection.examples:,} of them, as data.mixture asks")
    return selection


def _evaluation(plan: DataPlan, template: str | None, config: TrainConfig, say: Say) -> EvaluationPlan | None:
    with translating("the rows to evaluate could not be prepared"):
        made = plan_evaluation(config.evaluate, config.data, plan, template, config.train.layout, on_ray)
    if made is not None:
        held = sum(len(examples) for examples in made.sources.values())
        say(f"evaluating on {held:,} held-out examples and {len(made.prompts)} prompt(s)")
    return made


def _look(plan: DataPlan, config: TrainConfig, say: Say) -> None:
    """Counts the first rows alone: a run that ends by steps starts before its data was read to the end."""
    say(f"reading {len(plan.files)} file(s) while training, masking with the chat template of {config.model.id}")
    counted = Survey()
    for table in here(plan, prepare_rows):
        counted.add(table)
        if counted.rows >= LOOKED_AT:
            break
    counted.check(config.data.max_bad_fraction)


def _told(counted: Survey, folder: RunFolder) -> str:
    bad, left_out = counted.total.faults.total(), counted.total.excluded.total()
    return (
        f"{counted.kept:,} examples, {counted.tokens:,} tokens, {counted.trained_tokens:,} trained"
        + (f"; {bad:,} of {counted.rows:,} rows quarantined in {folder.quarantine}" if bad else "")
        + (f"; {left_out:,} rows left out as the config asks" if left_out else "")
    )


def _train(
    config: TrainConfig,
    epochs: Epochs,
    tokenizer: BaseTokenizer,
    prints: Fingerprints,
    start: StartAdapter | None,
    folder: RunFolder,
    reporter: Reporter,
    evaluation: EvaluationPlan | None,
    say: Say,
    work: Path,
) -> Path:
    """Goes on from the newest checkpoint to the last one, and makes the run's result of it or of the best."""
    store, values = CheckpointStore(folder.address), config.model_dump(mode="json")
    found = store.newest(prints, values, work, lambda _: None)  # the workers look, too, and tell
    reporter.go_on(read_metrics(found.folder) if found else b"")
    selection = epochs.selection
    if found is None or not found.run.finished:
        counted = _fit(config, epochs, tokenizer, prints, start, folder, reporter, evaluation, say)
        found = store.newest(prints, values, work, say)
        last = reporter.last
        if last is not None and last.step < last.total_steps and config.evaluate.early_stopping:
            say(f"ended after step {last.step:,} of {last.total_steps:,}: the held-out loss got no better")
    elif selection is not None:
        counted = selection.survey
    else:
        counted = survey(on_ray(epochs.plan, prepare_rows))
    if found is None or not found.run.finished:
        raise TrainingError(f"run {config.name} ended without its last checkpoint; nothing was published")
    if config.evaluate.use == "best":
        found = store.best(found.run, work)
    return make_product(found.folder, config, tokenizer, prints, counted, reporter, folder, epochs.plan.base)


def _fit(
    config: TrainConfig,
    epochs: Epochs,
    tokenizer: BaseTokenizer,
    prints: Fingerprints,
    start: StartAdapter | None,
    folder: RunFolder,
    reporter: Reporter,
    evaluation: EvaluationPlan | None,
    say: Say,
) -> Survey:
    """Runs the worker group; returns what the data held as far as it was read."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    scaling, workers = config.scaling, config.scaling.workers
    elastic = workers.min < workers.max
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scaling.resource_timeout_s)
    # What the workers tell must outlive their nodes.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    reports = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
    selection = epochs.selection
    limit = config.data.max_bad_fraction if selection is None else None
    feed = feed_actor(epochs, _feed_plan(config, tokenizer, selection.examples if selection else None), limit)
    job = WorkerJob(
        model=_model_plan(config, epochs.plan.base, start),
        config=config.model_dump(mode="json"),
        deepspeed=config.deepspeed,
        train=config.train,
        plus_ratio=config.lora.plus_ratio,
        save_every=config.checkpoint.every_steps,
        fingerprints=prints,
        run_address=folder.address,
        num_to_keep=config.checkpoint.num_to_keep,
        feed=feed,
        reports=reports,
        watch=watch_plan(config.evaluate),
        evaluation=ray.put(evaluation) if evaluation else None,
        objective=_objective(config),
        start=ray.put(start.weights) if start else None,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(workers.min, workers.max) if elastic else workers.max,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=scaling.resize_interval_s,  # type: ignore[call-arg]
            use_gpu=scaling.use_gpu,
            resources_per_worker=_worker_resources(config),
            placement_strategy=scaling.placement_strategy,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=folder.address.rsplit("/", 1)[0],
            failure_config=FailureConfig(
                max_failures=config.failure.max_failures,
                controller_failure_limit=max(config.failure.max_failures, 0),  # type: ignore[call-arg]
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
        return shortage(workers.min, _worker_resources(config))

    listener = Listener(reports, reporter, say, lacking, scaling.resource_timeout_s if elastic else None)
    try:
        trainer.fit()
        if selection is not None:
            counted = selection.survey
        else:
            counted = ray.get(feed.survey.remote())
            save_json(folder.survey, counted.to_dict())
            if counted.refused:
                storage.write(folder.quarantine, counted.quarantine())
            say(_told(counted, folder))
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
        reporter.close()
    return counted


def _no_room(lacking: str, config: TrainConfig) -> TrainingError:
    return TrainingError(
        f"the workers did not start within {config.scaling.resource_timeout_s:g} s: the run needs {lacking}; "
        "lower scaling.num_workers, use a larger cluster, or raise scaling.resource_timeout_s"
    )


def _result(made: Path, folder: RunFolder, seconds: float, *, reused: bool) -> TrainingResult:
    is_model = (made / MODEL_MANIFEST).is_file()
    metrics = (verify_model(made) if is_model else verify_bundle(made)).lineage["metrics"]
    return TrainingResult(
        bundle=made,
        folder=folder,
        steps=metrics["steps"],
        loss=float("nan") if metrics["loss"] is None else metrics["loss"],
        tokens_per_s=metrics["tokens_per_s"],
        trained_tokens_per_s=metrics["trained_tokens_per_s"],
        seconds=seconds,
        reused=reused,
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


def _worker_resources(config: TrainConfig) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": config.scaling.cpus_per_worker}
    if config.scaling.use_gpu:
        resources["GPU"] = 1
    return resources
