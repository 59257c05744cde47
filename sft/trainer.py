"""The driver: data sets + TorchTrainer -> an adapter bundle, or a model folder where no bundle can hold the result."""

from __future__ import annotations

import functools
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sft import storage
from sft.adapter import base_fingerprint, verify_bundle
from sft.base import locate, read_template
from sft.checkpoint import Fingerprints, read_metrics
from sft.checkpoint_store import CheckpointStore
from sft.cluster import connect, shortage
from sft.config import TrainConfig
from sft.data import DataPlan, here, on_ray, plan_data, prepare_rows
from sft.ending import ending
from sft.errors import ConfigError, TrainingError
from sft.evaluation import EvaluationPlan
from sft.evaluation_rows import plan_evaluation
from sft.failures import translating
from sft.model_folder import MANIFEST as MODEL_MANIFEST
from sft.model_folder import verify_model
from sft.product import make_product
from sft.report import Reporter, clock
from sft.run import RunFolder, fetch_bundle, fetch_model, open_run, save_json
from sft.selection import Epochs, Selection, needs_all_rows, select
from sft.start import start_of
from sft.survey import Survey, survey
from sft.trackers import check_installed, trackers
from sft.worker_group import PreparedRun, Say, fit, told, worker_resources

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
    lacking = shortage(scaling.workers.min, worker_resources(config))
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
    run = PreparedRun(config, epochs, tokenizer, prints, start, folder, reporter, evaluation, say)
    with ending(folder, tracked, say), tempfile.TemporaryDirectory(prefix="raysft-run-") as work:
        made = _train(run, Path(work))
    seconds = time.perf_counter() - begin
    say(f"trained in {clock(seconds)}; {what} in {kept}")
    return _result(made, folder, seconds, reused=False)


def _select(plan: DataPlan, folder: RunFolder, config: TrainConfig, say: Say) -> Selection:
    say(f"reading {len(plan.files)} file(s), masking with the chat template of {config.model.id}")
    with translating("the data could not be prepared"), storage.write_late(folder.quarantine) as quarantine:
        selection = select(config.data, plan, on_ray, quarantine)
    save_json(folder.survey, {**selection.survey.to_dict(), "hold_out": selection.hold_out.to_dict()})
    say(told(selection.survey, folder))
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


def _train(run: PreparedRun, work: Path) -> Path:
    """Goes on from the newest checkpoint to the last one, and makes the run's result of it or of the best."""
    config, prints, selection, say = run.config, run.prints, run.epochs.selection, run.say
    store, values = CheckpointStore(run.folder.address), config.model_dump(mode="json")
    found = store.newest(prints, values, work, lambda _: None)  # the workers look, too, and tell
    run.reporter.go_on(read_metrics(found.folder) if found else b"")
    if found is None or not found.run.finished:
        counted = fit(run)
        found = store.newest(prints, values, work, say)
        last = run.reporter.last
        if last is not None and last.step < last.total_steps and config.evaluate.early_stopping:
            say(f"ended after step {last.step:,} of {last.total_steps:,}: the held-out loss got no better")
    elif selection is not None:
        counted = selection.survey
    else:
        counted = survey(on_ray(run.epochs.plan, prepare_rows))
    if found is None or not found.run.finished:
        raise TrainingError(f"run {config.name} ended without its last checkpoint; nothing was published")
    if config.evaluate.use == "best":
        found = store.best(found.run, work)
    return make_product(run, found.folder, counted)


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
