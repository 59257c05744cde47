"""What a training run stands on is killed at the worst moments; the result must be that of a run left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sft.checkpoint import verify_checkpoint
from sft.config import TrainConfig
from sft.data import here, plan_data, prepare_rows
from sft.trace import MODULUS, trace
from tests.chaos.cluster import Chaos, chaos_cluster, kill, log_of, metrics, until
from tests.heads import job_id, ray_job
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]
WEIGHTS = "bundle/adapter_model.safetensors"
STEPS = 8
TRAIN = {"epochs": 2, "global_batch_size": 6, "micro_batch_size": 1, "layout": "padded", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with chaos_cluster(tmp_path_factory.mktemp("chaos")) as running:
        yield running


@dataclass(frozen=True)
class Whole:
    """A run that was left alone."""

    folder: Path
    steps: list[dict[str, Any]]


@pytest.fixture(scope="module")
def whole(chaos: Chaos, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    made = run_config(folder, tiny_model)
    chaos.run(made)
    steps = metrics(made)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    ids = [row for table in here(plan_data(made.data, tiny_model), prepare_rows) for row in kept_ids(table)]
    for epoch in (steps[:4], steps[4:]):
        assert sum(int(step["rows"], 16) for step in epoch) % MODULUS == trace(ids)
    return Whole(folder / "runs/tiny", steps)


def kept_ids(table: Any) -> list[str]:
    return [row["id"] for row in table.select(["id", "reason"]).to_pylist() if row["reason"] == ""]


def run_config(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    return config(
        folder,
        base,
        **{
            "train": TRAIN,
            "checkpoint": {"every_steps": 2},
            "scaling": {"num_workers": 2, "placement_strategy": "SPREAD"},
            "failure": {"max_failures": 2},
            **changes,
        },
    )


def assert_same(made: TrainConfig, whole: Whole) -> None:
    """The same rows in the same steps with the same losses, and the same bytes at the end."""
    seen = ("step", "loss", "grad_norm", "learning_rate", "rows", "tokens")
    assert [[step[key] for key in seen] for step in metrics(made)] == [[s[key] for key in seen] for s in whole.steps]
    folder = Path(made.storage) / made.name
    assert (folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()


def assert_alike(made: TrainConfig, whole: Whole) -> None:
    """The same rows in the same steps; losses and weights to float32 rounding."""
    found = metrics(made)
    assert [(step["step"], step["rows"]) for step in found] == [(step["step"], step["rows"]) for step in whole.steps]
    assert [step["loss"] for step in found] == pytest.approx([step["loss"] for step in whole.steps], rel=1e-5)
    one, other = load_file(Path(made.storage) / made.name / WEIGHTS), load_file(whole.folder / WEIGHTS)
    assert max(float((one[key] - other[key]).abs().max()) for key in other) < 1e-4  # a step moves a weight by 1e-2


@pytest.mark.parametrize("place", ["step-0-1-1", "step-0-3-0", "step-1-1-1", "upload-4", "upload-8"])
def test_a_worker_killed_in_a_step_or_in_an_upload(
    chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path, place: str
) -> None:
    made = run_config(tmp_path, tiny_model)
    chaos.arm(place)
    process = chaos.start(made)
    kill(chaos.wait(place))
    log = chaos.finish(made, process)
    assert "a new group of 2 worker(s) has started" in log
    if place == "upload-4":
        assert "checkpoint-00000004-" in log
        assert "was not written to its end; passing it over" in log
    assert_same(made, whole)


@pytest.mark.parametrize("place", ["step-0-1-0", "step-1-2-1", "upload-6"])
def test_a_driver_killed_and_started_again(
    chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path, place: str
) -> None:
    made = run_config(tmp_path, tiny_model)
    chaos.arm(place)
    process = chaos.start(made)
    chaos.wait(place)
    process.kill()
    process.wait()
    chaos.run(made)
    assert_same(made, whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"scaling": {"num_workers": 1}, "deepspeed": {"zero_stage": 3}},
        {"scaling": {"num_workers": 3}, "deepspeed": {"zero_stage": 2}},
        {"scaling": {"num_workers": 2}, "train": {**TRAIN, "micro_batch_size": 3}},
    ],
)
def test_a_run_goes_on_with_other_workers_and_another_stage(
    chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path, changes: dict[str, Any]
) -> None:
    chaos.arm("step-1-1-1")
    process = chaos.start(run_config(tmp_path, tiny_model))
    chaos.wait("step-1-1-1")
    process.kill()
    process.wait()
    made = run_config(tmp_path, tiny_model, **changes)
    assert "going on after step 4" in chaos.run(made)
    assert_alike(made, whole)


def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path
) -> None:
    made = run_config(tmp_path, tiny_model)
    chaos.arm("step-1-1-1")
    process = chaos.start(made)
    chaos.wait("step-1-1-1")
    process.kill()
    process.wait()
    [newest] = (tmp_path / "runs/tiny").glob("checkpoint-00000004-*")
    (newest / "optimizer.safetensors").write_bytes(b"")
    log = chaos.run(made)
    assert "optimizer.safetensors: the file is not what the manifest says" in log
    assert "what was trained after step 2 is trained again" in log
    assert_same(made, whole)


def test_a_lost_node(chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path) -> None:
    made = run_config(tmp_path, tiny_model)
    chaos.arm("step-1-0-0")
    process = chaos.start(made)
    chaos.wait("step-1-0-0")
    chaos.kill_node()
    try:
        chaos.finish(made, process)
    finally:
        chaos.add_node()
    assert_same(made, whole)


def test_workers_come_and_go(chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path) -> None:
    """Each node has room for one worker, and the first one for the data beside it; the second one goes and comes."""
    scaling = {"num_workers": {"min": 1, "max": 2}, "cpus_per_worker": 2.5, "resize_interval_s": 2}
    made = run_config(tmp_path, tiny_model, scaling=scaling)
    chaos.slow(2.0)
    try:
        process = chaos.start(made)
        path = tmp_path / "runs/tiny/metrics.jsonl"
        until(lambda: path.exists() and len(path.read_text().splitlines()) >= 2, "no step was trained")
        chaos.kill_node()
        until(lambda: "a new group of 1 worker(s) has started" in log_of(made), "nobody went on alone")
        chaos.add_node()
        until(lambda: "a new group of 2 worker(s) has started" in log_of(made), "nobody joined")
    finally:
        chaos.slow(0)
    chaos.finish(made, process)
    assert_alike(made, whole)


def test_a_job_that_is_stopped_goes_on(chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path) -> None:
    """`ray job stop` ends the driver with SIGTERM; the same job is submitted again."""
    made = run_config(tmp_path, tiny_model, ray={})
    file = tmp_path / "run.yaml"
    file.write_text(made.model_dump_json())
    run = tmp_path / "runs/tiny"
    chaos.slow(1.0)
    (tmp_path / "empty").mkdir()
    job = job_command(chaos, "submit", "--no-wait", f"--working-dir={tmp_path / 'empty'}", "--", *train(file))
    until(lambda: len(list(run.glob("checkpoint-*/manifest.json"))) >= 2, "no checkpoint was written")
    name = job_id(job)
    stopped = job_command(chaos, "stop", name)
    chaos.slow(0)
    assert "was stopped" in stopped
    assert "the same command goes on from the last one" in job_command(chaos, "logs", name)
    assert not (run / "bundle").exists()
    whole_ones = [path.parent for path in run.glob("checkpoint-*/manifest.json")]
    assert max(verify_checkpoint(path).step for path in whole_ones) >= 4
    log = job_command(chaos, "submit", f"--working-dir={tmp_path / 'empty'}", "--", *train(file))
    assert "going on after step" in log
    assert_same(made, whole)


def test_a_run_that_diverges_stops_at_once_whatever_restarts_are_allowed(
    chaos: Chaos, tmp_path: Path, tiny_model: Path
) -> None:
    made = run_config(tmp_path, tiny_model, train={**TRAIN, "learning_rate": 1e30}, failure={"max_failures": -1})
    assert chaos.start(made).wait(300) == 1
    log = log_of(made)
    assert "error: the loss of step 2 is nan (epoch 0, its step 1); the last checkpoint is good." in log
    assert "a new group" not in log
    bad = json.loads((tmp_path / "runs/tiny/bad-step-2.json").read_text())
    assert (bad["step"], bad["loss"], len(bad["rows"])) == (2, "nan", 6)
    assert set(bad["suspects"]) <= set(bad["rows"])


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(
    chaos: Chaos, whole: Whole, tmp_path: Path, tiny_model: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    made = run_config(tmp_path, tiny_model, storage=str(small / "runs"), failure={"max_failures": -1})
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(small)], check=True)
    try:
        process = chaos.start(made)
        assert process.wait(300) == 1
        log = log_of(made)
        assert "the checkpoint of step 4 could not be written" in log
        assert "no space left" in log
        assert "a new group" not in log
        assert [path.name.split("-")[1] for path in (small / "runs/tiny").glob("checkpoint-*")] == ["00000002"]
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        assert "going on after step 2" in chaos.run(made)
        assert_same(made, whole)
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("workers", [6, {"min": 6, "max": 7}])
def test_workers_for_which_there_is_no_room(chaos: Chaos, tmp_path: Path, tiny_model: Path, workers: Any) -> None:
    scaling = {"num_workers": workers, "cpus_per_worker": 3, "resource_timeout_s": 5}
    made = run_config(tmp_path, tiny_model, train={**TRAIN, "global_batch_size": 8}, scaling=scaling)
    assert chaos.start(made).wait(300) == 1
    log = log_of(made)
    asked = "6 worker(s) with 3 CPU each, 18 CPU together; the cluster has 7 CPU on 2 node(s), which is room for 2"
    assert f"the run needs {asked}; waiting for more, at most 5 s" in log
    assert f"the workers did not start within 5 s: the run needs {asked}; lower scaling.num_workers" in log


def train(file: Path) -> list[str]:
    return [sys.executable, "-m", "jobs.train", "--config", str(file)]


def job_command(chaos: Chaos, *words: str) -> str:
    code, said = ray_job(chaos.dashboard, *words)
    assert code == 0, said[-4000:]
    return said
