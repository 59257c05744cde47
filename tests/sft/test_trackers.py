from __future__ import annotations

import importlib
import importlib.util
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sft import trackers as module
from sft.errors import ConfigError
from sft.trackers import Status, Tracker, Trackers, check_installed, flat, trackers
from sft.tracking_config import MlflowSection, TrackingSection

CONFIG = {"name": "run", "train": {"epochs": 2, "betas": [0.9, 0.999]}, "data": {}}


def needs(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"{name} is an option of the user's and not installed")


def started(section: Mapping[str, Any], folder: Path) -> tuple[Trackers, list[str]]:
    said: list[str] = []
    address = str(folder / "runs" / "run")
    return trackers(TrackingSection.model_validate(section), "run", address, CONFIG, said.append), said


class Heard:
    """A tracker that notes what it hears, and fails or waits where it is told to."""

    def __init__(self, fail_at: int | None = None, wait: threading.Event | None = None) -> None:
        self.calls: list[Any] = []
        self.fail_at = fail_at
        self.wait = wait

    def start(self, config: Mapping[str, Any]) -> None:
        self._hear(dict(config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._hear((step, dict(values)))

    def finish(self, status: Status) -> None:
        self._hear(status)

    def _hear(self, call: Any) -> None:
        if self.wait is not None:
            self.wait.wait(20)
        self.calls.append(call)
        if len(self.calls) == self.fail_at:
            raise OSError("the server is away\nand more lines")


def behind(*of: Tracker) -> tuple[Trackers, list[str]]:
    said: list[str] = []
    return Trackers([module._Thread(tracker, CONFIG, said.append) for tracker in of]), said


def test_a_tracker_hears_all_in_order() -> None:
    heard = Heard()
    all_of_them, said = behind(heard)
    all_of_them.log(1, {"loss": 2.0})
    all_of_them.log(2, {"loss": 1.0})
    all_of_them.finish("finished")
    assert heard.calls == [CONFIG, (1, {"loss": 2.0}), (2, {"loss": 1.0}), "finished"]
    assert said == []


def test_a_tracker_that_fails_is_told_of_once_and_the_others_go_on() -> None:
    bad, good = Heard(fail_at=2), Heard()
    all_of_them, said = behind(bad, good)
    for step in (1, 2, 3):
        all_of_them.log(step, {})
    all_of_them.finish("failed")
    assert (len(bad.calls), len(good.calls)) == (2, 5)
    assert said == ["warning: Heard is left out from now on, the run goes on without it (OSError: the server is away)"]


def test_a_tracker_that_hangs_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSE_SECONDS", 0.1)
    free = threading.Event()
    all_of_them, said = behind(Heard(wait=free))
    begin = time.monotonic()
    all_of_them.log(1, {})
    all_of_them.finish("finished")
    assert time.monotonic() - begin < 10
    assert said == ["warning: Heard is left out from now on, the run goes on without it (did not end within 0.1 s)"]
    free.set()


def test_a_package_that_is_missing_is_a_fault_of_the_config_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_installed(TrackingSection())
    section = TrackingSection.model_validate({"tensorboard": True, "mlflow": {}, "wandb": {}})
    with pytest.raises(ConfigError) as caught:
        check_installed(section)
    assert caught.value.faults == (
        "tensorboard needs a package that is not installed: pip install tensorboardX",
        "mlflow needs a package that is not installed: pip install mlflow-skinny",
        "wandb needs a package that is not installed: pip install wandb",
    )


def test_a_password_does_not_go_into_a_config() -> None:
    assert MlflowSection(tracking_uri="https://mlflow.example.com:5000").tracking_uri
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_PASSWORD"):
        MlflowSection(tracking_uri="https://me:secret@mlflow.example.com")


def test_a_config_is_flat_for_trackers() -> None:
    assert flat(CONFIG) == {"name": "run", "train.epochs": 2, "train.betas": [0.9, 0.999], "data": {}}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_curves_of_a_run(tmp_path: Path) -> None:
    event_type = importlib.import_module("tensorboardX.proto.event_pb2").Event

    for steps in ((1, 2), (2, 3)):  # the second goes on from a checkpoint
        tracked, said = started({"tensorboard": True}, tmp_path)
        for step in steps:
            tracked.log(step, {"train/loss": 1.0 / step})
        tracked.finish("finished")
        assert said == []
    found = []
    for path in sorted((tmp_path / "runs" / "run" / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = event_type.FromString(content[place + 12 : place + 12 + length])
            found += [
                (event.step, value.tag, value.simple_value) for value in event.summary.value if "/loss" in value.tag
            ]
            place += 16 + length
    assert {(step, tag) for step, tag, _ in found} == {(1, "train/loss"), (2, "train/loss"), (3, "train/loss")}
    assert {step: value for step, _, value in found}[2] == 0.5


@needs("mlflow")
@pytest.mark.filterwarnings("ignore")
def test_mlflow_holds_one_run_however_often_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = importlib.import_module("mlflow")

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    section = {"mlflow": {"tracking_uri": f"file://{tmp_path}/mlruns", "experiment": "tests"}}
    for steps in ((1, 2), (2, 3)):
        tracked, said = started(section, tmp_path)
        for step in steps:
            tracked.log(step, {"train/loss": 1.0 / step, "held_out/loss/a: b": 2.0})
        tracked.finish("finished" if 3 in steps else "stopped")
        assert said == []
    client = mlflow.MlflowClient(f"file://{tmp_path}/mlruns")
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params["train.epochs"]) == ("run", "FINISHED", "2")
    assert {m.step for m in client.get_metric_history(run.info.run_id, "train/loss")} == {1, 2, 3}
    assert run.data.metrics["held_out/loss/a_ b"] == 2.0


@needs("wandb")
@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_an_offline_run(tmp_path: Path) -> None:
    (tmp_path / "runs" / "run").mkdir(parents=True)
    tracked, said = started({"wandb": {"mode": "offline", "project": "tests"}}, tmp_path)
    tracked.log(1, {"train/loss": 1.0})
    tracked.finish("finished")
    assert said == []
    (folder,) = (tmp_path / "runs" / "run" / "wandb").glob("offline-run-*")
    assert [path for path in folder.iterdir() if path.suffix == ".wandb"]
