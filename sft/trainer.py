"""The driver: data sets + TorchTrainer -> an adapter bundle."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import storage
from sft.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    GOLDEN_MESSAGES,
    Golden,
    base_fingerprint,
    verify_bundle,
    write_bundle,
)
from sft.base import BaseTokenizer, locate, read_template
from sft.best import fetch_best
from sft.card import model_card
from sft.checkpoint import Fingerprints, verify_checkpoint
from sft.cluster import connect, shortage
from sft.config import TrainConfig, TrainSection
from sft.data import DataPlan, here, on_ray, plan_data, prepare_rows
from sft.ending import ending
from sft.errors import ConfigError, RaysftError, TrainingError
from sft.evaluation import Evaluation, EvaluationPlan
from sft.evaluation_rows import plan_evaluation
from sft.feed import FeedPlan
from sft.loop import StepReport
from sft.model import LoraPlan, ModelPlan
from sft.record import evaluation_at, read_record
from sft.report import Reporter, clock
from sft.run import RunFolder, fetch_bundle, keep_bundle, open_run, save_json
from sft.selection import Epochs, Selection, needs_all_rows, select
from sft.survey import Survey
from sft.tokens import encode
from sft.trackers import check_installed, trackers
from sft.watch import watch_plan
from sft.worker import WorkerJob, feed_actor, train_worker

Say = Callable[[str], None]

LOOKED_AT = 1000
"""Rows that are checked before the workers of a run that does not count its data first are started."""


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run.

    Rule: `bundle` is a verified adapter bundle on local disk; `tokens_per_s` counts all tokens over the time of the
    steps alone, in the run that made the bundle; `seconds` is all the time that this call took.
    """

    bundle: Path
    folder: RunFolder
    steps: int
    loss: float
    tokens_per_s: float
    trained_tokens_per_s: float
    seconds: float
    reused: bool


def train(config: TrainConfig, say: Say = print) -> TrainingResult:
    """Runs a training run to its end, or takes the result of the finished run of this name.

    Raises:
        RaysftError: a fault that a user can mend; nothing half-written looks whole.
        KeyboardInterrupt: the user stopped the run; the last checkpoint is good.
    """
    begin = time.perf_counter()
    base = locate(config.model.base)
    check_installed(config.tracking)
    template = read_template(config.model.chat_template)
    plan = plan_data(config.data, base, template, config.evaluate.share)
    tokenizer = plan.tokenizer()
    folder = open_run(config)
    finished = fetch_bundle(folder)
    if finished is not None:
        say(f"run {config.name} is finished already; taking its bundle from {folder.bundle}")
        return _result(finished, folder, time.perf_counter() - begin, reused=True)
    scaling = config.scaling
    started = connect(
        config.ray.address,
        num_cpus=config.ray.num_cpus,
        needed_cpus=scaling.num_workers * scaling.cpus_per_worker + 2,
    )
    lacking = shortage(_resources(config))
    if lacking and started:
        raise ConfigError("scaling", [f"the run needs {lacking}; lower scaling.num_workers or raise ray.num_cpus"])
    selection = None
    if config.train.whole_epochs or needs_all_rows(config.data):
        selection = _select(plan, folder, config, say)
    else:
        _look(plan, config, say)
    data = selection.survey.fingerprint if selection else plan.fingerprint
    prints = Fingerprints(base_fingerprint(base), tokenizer.template.fingerprint, data)
    evaluation = _evaluation(plan, template, config, say)
    tracked = trackers(config.tracking, config.name, folder.address, config.model_dump(mode="json"), say)
    decode = functools.partial(tokenizer.tokenizer.decode, skip_special_tokens=True)
    reporter = Reporter(folder.metrics, say, evaluations=folder.evaluations, decode=decode, trackers=tracked)
    epochs = Epochs(selection.plan if selection else plan, config.train.seed, selection)
    with ending(folder, tracked, say):
        checkpoint, counted = _fit(config, epochs, tokenizer, prints, folder, reporter, evaluation, say)
        with checkpoint.as_directory() as local:
            chosen = Path(local)
            if config.evaluate.use == "best":
                chosen = fetch_best(folder.address, verify_checkpoint(chosen))
            bundle = _bundle(chosen, config, tokenizer, prints, counted, reporter, folder)
    seconds = time.perf_counter() - begin
    say(f"trained in {clock(seconds)}; bundle in {folder.bundle}")
    return _result(bundle, folder, seconds, reused=False)


def _select(plan: DataPlan, folder: RunFolder, config: TrainConfig, say: Say) -> Selection:
    say(f"reading {len(plan.files)} file(s), masking with the chat template of {config.model.id}")
    try:
        with storage.write_late(folder.quarantine) as quarantine:
            selection = select(config.data, plan, on_ray, quarantine)
    except RaysftError:
        raise
    except Exception as error:
        raise _translated(error, "the data could not be prepared") from None
    save_json(folder.survey, {**selection.survey.to_dict(), "hold_out": selection.hold_out.to_dict()})
    say(_told(selection.survey, folder))
    if selection.mixed:
        say(f"an epoch holds {selection.examples:,} of them, as data.mixture asks")
    return selection


def _evaluation(plan: DataPlan, template: str | None, config: TrainConfig, say: Say) -> EvaluationPlan | None:
    try:
        made = plan_evaluation(config.evaluate, config.data, plan, template, config.train.layout, on_ray)
    except RaysftError:
        raise
    except Exception as error:
        raise _translated(error, "the rows to evaluate could not be prepared") from None
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


def _fit(
    config: TrainConfig,
    epochs: Epochs,
    tokenizer: BaseTokenizer,
    prints: Fingerprints,
    folder: RunFolder,
    reporter: Reporter,
    evaluation: EvaluationPlan | None,
    say: Say,
) -> tuple[Any, Survey]:
    """Runs the worker group; returns Ray Train's last checkpoint, and what the data held as far as it was read."""
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.queue import Queue

    scaling = config.scaling
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(scaling.resource_timeout_s)
    reports = Queue(actor_options={"num_cpus": 0})
    selection = epochs.selection
    limit = config.data.max_bad_fraction if selection is None else None
    feed = feed_actor(epochs, _feed_plan(config, tokenizer, selection.examples if selection else None), limit)
    job = WorkerJob(
        model=_model_plan(config, epochs.plan.base),
        config=config.model_dump(mode="json"),
        deepspeed=config.deepspeed,
        train=config.train,
        save_every=config.checkpoint.every_steps,
        fingerprints=prints,
        run_address=folder.address,
        feed=feed,
        reports=reports,
        watch=watch_plan(config.evaluate),
        evaluation=ray.put(evaluation) if evaluation else None,
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
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
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.num_to_keep),
        ),
    )
    say(
        f"training {_length(config.train)} with {config.train.global_batch_size} {_ROWS[config.train.layout]} a step "
        f"on {scaling.num_workers} {'GPU' if scaling.use_gpu else 'CPU'} worker(s), "
        f"ZeRO stage {config.deepspeed.zero_stage}"
    )
    listener = _Listener(reports, reporter)
    try:
        result = trainer.fit()
        if selection is not None:
            counted = selection.survey
        else:
            counted = ray.get(feed.survey.remote())
            save_json(folder.survey, counted.to_dict())
            if counted.refused:
                storage.write(folder.quarantine, counted.quarantine())
            say(_told(counted, folder))
    except (SystemExit, KeyboardInterrupt):
        say(f"stopping; checkpoints in {folder.address} are whole, and the same command goes on from the last one")
        raise KeyboardInterrupt from None  # Ray Train turns Ctrl-C into SystemExit(0)
    except Exception as error:
        lacking = shortage(_resources(config))
        if lacking and reporter.last is None:
            raise TrainingError(
                f"the workers did not start within {scaling.resource_timeout_s:g} s: the run needs {lacking}; "
                "lower scaling.num_workers, use a larger cluster, or raise scaling.resource_timeout_s"
            ) from None
        raise _translated(error, f"run {config.name} failed") from None
    finally:
        listener.stop()
        ray.kill(feed)
        reports.shutdown(force=True)
        reporter.close()
    if result.checkpoint is None:
        raise TrainingError(f"run {config.name} ended without a checkpoint; nothing was published")
    return result.checkpoint, counted


class _Listener:
    """Hands the workers' step reports to the reporter, in a thread of the driver."""

    def __init__(self, reports: Any, reporter: Reporter) -> None:
        self._reports = reports
        self._reporter = reporter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after what is in the queue."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        while True:
            stopping = self._stop.is_set()
            try:
                report: StepReport | Evaluation = self._reports.get(timeout=0.5)
            except Empty:
                if stopping:
                    return
            except RayError:
                return
            else:
                if isinstance(report, Evaluation):
                    self._reporter.evaluation(report)
                else:
                    self._reporter.step(report)


def _bundle(
    checkpoint: Path,
    config: TrainConfig,
    tokenizer: BaseTokenizer,
    prints: Fingerprints,
    counted: Survey,
    reporter: Reporter,
    folder: RunFolder,
) -> Path:
    run = verify_checkpoint(checkpoint)
    record = read_record(folder)
    work = Path(tempfile.mkdtemp(prefix="raysft-"))
    try:
        write_bundle(
            work / "bundle",
            weights=checkpoint / ADAPTER_WEIGHTS,
            peft_config=checkpoint / ADAPTER_CONFIG,
            template=tokenizer.template.source,
            base_model=config.model.id,
            base_fingerprint=prints.base,
            stop_ids=tokenizer.stop_ids,
            golden=golden(tokenizer),
            lineage={
                "run": config.name,
                "data_fingerprint": counted.fingerprint,
                "metrics": {
                    "steps": run.step,
                    "loss": reporter.loss(run.step),
                    "tokens_per_s": reporter.tokens / max(reporter.seconds, 1e-9),
                    "trained_tokens_per_s": reporter.trained_tokens / max(reporter.seconds, 1e-9),
                },
                "data": counted.to_dict(),
                "evaluation": evaluation_at(record, run.step),
                "config": run.config,
            },
            card=model_card(record, run.step, counted.to_dict(), prints.base),
        )
        return keep_bundle(folder, work / "bundle")
    finally:
        if "://" not in folder.bundle:
            shutil.rmtree(work, ignore_errors=True)


def golden(tokenizer: BaseTokenizer) -> list[Golden]:
    """Fixed conversations with the exact prompt ids that this tokenizer and template make of them."""
    made = []
    for messages in GOLDEN_MESSAGES:
        text = tokenizer.template.render_prompt(messages)
        if text is not None:
            made.append(Golden(messages=messages, prompt_ids=tuple(encode(tokenizer.tokenizer, [text])[0])))
    return made


def _result(bundle: Path, folder: RunFolder, seconds: float, *, reused: bool) -> TrainingResult:
    metrics = verify_bundle(bundle).lineage["metrics"]
    return TrainingResult(
        bundle=bundle,
        folder=folder,
        steps=metrics["steps"],
        loss=float("nan") if metrics["loss"] is None else metrics["loss"],
        tokens_per_s=metrics["tokens_per_s"],
        trained_tokens_per_s=metrics["trained_tokens_per_s"],
        seconds=seconds,
        reused=reused,
    )


def _translated(error: Exception, what: str) -> RaysftError:
    """The user's own fault if one is inside a worker's error, else one line with the error's last words."""
    inner: list[BaseException] = list(getattr(error, "worker_failures", {}).values())
    controller = getattr(error, "controller_failure", None)
    candidates = [*inner, *([controller] if controller else []), error]
    for candidate in candidates:
        cause: BaseException | None = candidate
        while cause is not None:
            if isinstance(cause, RaysftError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__
    last = candidates[0]
    words = next((line for line in reversed(str(last).strip().splitlines()) if line.strip()), type(last).__name__)
    return TrainingError(f"{what}: {words.strip()} ({type(last).__name__}; the worker logs have the whole story)")


_ROWS = {"packed": "packs", "padded": "examples"}


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


def _model_plan(config: TrainConfig, base: Path) -> ModelPlan:
    model, lora = config.model, config.lora
    return ModelPlan(
        base=base,
        base_id=model.id,
        dtype=model.dtype,
        quantization=model.quantization,
        attention=model.attention,
        gradient_checkpointing=model.gradient_checkpointing,
        lora=LoraPlan(lora.rank, lora.alpha, lora.dropout, lora.target_modules),
    )


def _worker_resources(config: TrainConfig) -> dict[str, float]:
    resources: dict[str, float] = {"CPU": config.scaling.cpus_per_worker}
    if config.scaling.use_gpu:
        resources["GPU"] = 1
    return resources


def _resources(config: TrainConfig) -> dict[str, float]:
    return {name: amount * config.scaling.num_workers for name, amount in _worker_resources(config).items()}
