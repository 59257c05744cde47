"""Who else is told of a run's progress: TensorBoard, MLflow, Weights & Biases, behind one small seam.

A tracker is never worth a run: each has a thread of its own, so a slow one holds nothing up, and one that fails is
told of once and left out from then on. Their packages are the user's own choice, so they are imported by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

from sft.errors import ConfigError
from sft.tracking_config import MlflowSection, TrackingSection, WandbSection

Status = Literal["finished", "failed", "stopped"]
Say = Callable[[str], None]

CLOSE_SECONDS = 30.0
"""How long the end of a run waits for a tracker."""

_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}
"""What each tracker imports, and what is installed for it."""


class Tracker(Protocol):
    """One that is told of a run. All calls come from one thread, in this order."""

    def start(self, config: Mapping[str, Any]) -> None:
        """Begins the run, or takes it up again where it goes on; `config` is the resolved one."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Takes figures after so many steps; a step may come twice, where a run went on from a checkpoint."""

    def finish(self, status: Status) -> None:
        """Ends the run."""


def check_installed(section: TrackingSection) -> None:
    """Makes sure that what the config asks for can be imported.

    Raises:
        ConfigError: it cannot; names the command that installs it.
    """
    faults = []
    for name, (module, package) in _PACKAGES.items():
        if getattr(section, name) and importlib.util.find_spec(module) is None:
            faults.append(f"{name} needs a package that is not installed: pip install {package}")
    if faults:
        raise ConfigError("tracking", faults)


def trackers(section: TrackingSection, name: str, address: str, config: Mapping[str, Any], say: Say) -> Trackers:
    """Starts the trackers that a config asks for.

    Args:
        section: which.
        name: of the run.
        address: of the run's folder; tells the run from others of its name.
        config: the resolved config.
        say: prints a warning.
    """
    made: list[Tracker] = []
    if section.tensorboard:
        made.append(TensorBoard(Path(address) / "tensorboard"))
    if section.mlflow is not None:
        made.append(Mlflow(section.mlflow, name, address))
    if section.wandb is not None:
        made.append(Wandb(section.wandb, name, address))
    return Trackers([_Thread(tracker, config, say) for tracker in made])


class Trackers:
    """All trackers of a run as one; no call of it waits or fails."""

    def __init__(self, threads: Sequence[_Thread]) -> None:
        self._threads = threads

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hands figures to all trackers."""
        for thread in self._threads:
            thread.put(lambda tracker: tracker.log(step, values))

    def finish(self, status: Status) -> None:
        """Ends the run everywhere; gives up on a tracker that takes too long."""
        for thread in self._threads:
            thread.put(lambda tracker: tracker.finish(status), last=True)
        for thread in self._threads:
            thread.close()


class _Thread:
    """A tracker in its own thread."""

    def __init__(self, tracker: Tracker, config: Mapping[str, Any], say: Say) -> None:
        self._tracker = tracker
        self._say = say
        self._calls: queue.SimpleQueue[tuple[Callable[[Tracker], None], bool]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self.put(lambda started: started.start(config))

    def put(self, call: Callable[[Tracker], None], *, last: bool = False) -> None:
        self._calls.put((call, last))

    def close(self) -> None:
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn(f"did not end within {CLOSE_SECONDS:g} s")

    def _run(self) -> None:
        failed = last = False
        while not last:
            call, last = self._calls.get()
            if failed:
                continue
            try:
                call(self._tracker)
            except Exception as error:
                failed = True
                words = (str(error).strip().splitlines() or [""])[0]
                self._warn(f"{type(error).__name__}: {words[:200]}")

    def _warn(self, what: str) -> None:
        name = type(self._tracker).__name__
        self._say(f"warning: {name} is left out from now on, the run goes on without it ({what})")


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, config: Mapping[str, Any]) -> None:
        # Files are named by the second in which they are begun, and one of the same name is written over.
        suffix = f".{uuid.uuid4().hex[:8]}"
        self._writer = import_module("tensorboardX").SummaryWriter(str(self._folder), filename_suffix=suffix)
        settings = "\n".join(f"| {key} | {value} |" for key, value in flat(config).items())
        self._writer.add_text("config", f"| key | value |\n| --- | --- |\n{settings}", 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self, status: Status) -> None:
        self._writer.add_text("status", status, 0)
        self._writer.close()


class Mlflow:
    """A run on an MLflow server; found again by its folder's address when it goes on."""

    TAG = "raysft.run"

    def __init__(self, section: MlflowSection, name: str, address: str) -> None:
        self._section = section
        self._name = name
        self._address = address

    def start(self, config: Mapping[str, Any]) -> None:
        self._client = import_module("mlflow").MlflowClient(self._section.tracking_uri)
        found = self._client.get_experiment_by_name(self._section.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._section.experiment)
        tag = self._address.replace("'", "")
        before = self._client.search_runs([experiment], f"tags.`{self.TAG}` = '{tag}'", max_results=1)
        if before:
            self._run = before[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(experiment, run_name=self._name, tags={self.TAG: tag}).info.run_id
        for key, value in flat(config).items():
            self._client.log_param(self._run, key, str(value)[:500])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        metric = import_module("mlflow.entities").Metric
        now = int(time.time() * 1000)
        metrics = [metric(_mlflow_name(key), value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def finish(self, status: Status) -> None:
        self._client.set_terminated(
            self._run, {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}[status]
        )


class Wandb:
    """A run of Weights & Biases; its id follows from its folder's address, so it is the same when it goes on."""

    def __init__(self, section: WandbSection, name: str, address: str) -> None:
        self._section = section
        self._name = name
        self._address = address

    def start(self, config: Mapping[str, Any]) -> None:
        wandb = import_module("wandb")
        local = "://" not in self._address
        self._run = wandb.init(
            project=self._section.project,
            entity=self._section.entity,
            mode=self._section.mode,
            name=self._name,
            id=hashlib.sha256(self._address.encode()).hexdigest()[:16],
            resume="allow",
            dir=self._address if local else None,
            config=dict(config),
            settings=wandb.Settings(console="off", silent=True),
        )
        # With a step of its own, a step that is trained again is not refused.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def finish(self, status: Status) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested config as dotted keys."""
    made: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            made |= flat(value, f"{prefix}{key}.")
        else:
            made[f"{prefix}{key}"] = value
    return made


def _mlflow_name(key: str) -> str:
    """A name that MLflow takes: letters, digits and some marks."""
    return re.sub(r"[^\w\-./ ]", "_", key)
