from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sft.adapter import CARD, GOLDEN_MESSAGES, verify_bundle
from sft.base import load_tokenizer
from sft.checkpoint import verify_checkpoint
from sft.config import FailureSection, TrainConfig
from sft.errors import ConfigError, DataError, RaysftError, TrainingError
from sft.trainer import TrainingResult, train

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]
ROWS = 22


def config(folder: Path, base: Path, **changes: Any) -> TrainConfig:
    data = folder / "rows.jsonl"
    if not data.exists():
        rows = [{"instruction": f"count to {i}", "output": "x" * (i % 7 + 1)} for i in range(ROWS)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n")
    values = {
        "name": "tiny",
        "storage": str(folder / "runs"),
        "model": {"base": str(base), "base_id": "tiny-llama"},
        "lora": {"rank": 4},
        "data": {"sources": [{"path": str(data), "name": "rows"}]},
        "train": {
            "epochs": 2,
            "global_batch_size": 6,
            "micro_batch_size": 2,
            "layout": "padded",
            "learning_rate": 1e-2,
        },
        "scaling": {"num_workers": 2},
        "checkpoint": {"every_steps": 3},
        "ray": {"address": "auto"},
        **changes,
    }
    return TrainConfig.model_validate(values)


def metrics(folder: Path, name: str = "tiny") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@dataclass(frozen=True)
class Finished:
    """A run that was left alone."""

    folder: Path
    config: TrainConfig
    result: TrainingResult
    lines: list[str]


@pytest.fixture(scope="module")
def finished(cluster: str, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Finished:
    assert cluster
    folder = tmp_path_factory.mktemp("finished")
    lines: list[str] = []
    held_out = folder / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"instruction": f"say {i}", "output": "y" * i}) + "\n" for i in range(1, 6)))
    evaluate = {"sources": [{"path": str(held_out)}], "every_steps": 3, "prompts": ["count to 3"], "max_new_tokens": 4}
    made = config(folder, tiny_model, deepspeed={"zero_stage": 2}, evaluate=evaluate, tracking={"tensorboard": True})
    return Finished(folder, made, train(made, lines.append), lines)


def test_two_workers_train_a_bundle_and_the_run_can_be_taken_again(finished: Finished, tiny_model: Path) -> None:
    tmp_path, made, result, lines = finished.folder, finished.config, finished.result, finished.lines
    assert (result.steps, result.reused) == (8, False)

    bundle = verify_bundle(result.bundle)
    tokenizer = load_tokenizer(tiny_model)
    assert (bundle.base_model, bundle.rank, bundle.stop_ids) == ("tiny-llama", 4, (1,))
    assert bundle.template_fingerprint == tokenizer.template.fingerprint
    assert bundle.lineage["data"]["kept"] == ROWS
    assert bundle.lineage["config"]["train"]["epochs"] == 2
    for golden, messages in zip(bundle.golden, GOLDEN_MESSAGES, strict=True):
        ids = tokenizer.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"]
        assert list(golden.prompt_ids) == ids

    steps = metrics(tmp_path)
    assert [step["step"] for step in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert sum(step["trained_tokens"] for step in steps) == 2 * bundle.lineage["data"]["trained_tokens"]
    quarantine = (tmp_path / "runs/tiny/quarantine.jsonl").read_text().splitlines()
    assert [(json.loads(line)["position"], json.loads(line)["reason"]) for line in quarantine] == [
        (ROWS + 1, "invalid_json")
    ]
    checkpoints = sorted((tmp_path / "runs/tiny").glob("checkpoint-*"))
    assert [verify_checkpoint(path).step for path in checkpoints] == [6, 8]  # the newest two are kept
    assert any("step 1/8" in line for line in lines)
    assert any("22 examples" in line and "1 of 23 rows quarantined" in line for line in lines)

    again = train(made, lines.append)
    assert (again.reused, again.steps, verify_bundle(again.bundle)) == (True, 8, bundle)
    assert len(metrics(tmp_path)) == 8


def test_a_run_is_evaluated_and_leaves_its_report_and_its_card(finished: Finished) -> None:
    run = finished.folder / "runs" / "tiny"
    evaluations = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [made["step"] for made in evaluations] == [0, 3, 6, 8]
    assert {(made["sources"]["held_out.jsonl"]["rows"], made["samples"][0]["prompt"]) for made in evaluations} == {
        (5, "count to 3")
    }
    best = min(evaluations[1:], key=lambda made: made["loss"])
    assert [path.name for path in run.glob("best-*")] == [f"best-{best['step']:08d}"]
    assert verify_checkpoint(run / f"best-{best['step']:08d}").history[-1] == (best["step"], best["loss"])
    assert "<b>Finished</b> after 8 steps" in (run / "report.html").read_text()
    assert list((run / "tensorboard").iterdir())
    bundle = verify_bundle(finished.result.bundle)
    assert bundle.lineage["evaluation"]["loss"] == evaluations[-1]["loss"]
    assert f"| {ROWS} |" in (finished.result.bundle / CARD).read_text()
    assert any("step 3 evaluated  held-out loss" in line for line in finished.lines)


def test_a_run_that_ends_by_steps_starts_before_its_data_is_counted(
    cluster: str, tmp_path: Path, tiny_model: Path
) -> None:
    assert cluster
    lines: list[str] = []
    train_section = {"max_steps": 6, "global_batch_size": 6, "micro_batch_size": 2, "layout": "padded"}
    data = {"mask": {"prompt_weight": 0.1}, "sources": [{"path": str(tmp_path / "rows.jsonl"), "name": "rows"}]}
    made = config(tmp_path, tiny_model, train=train_section, data=data, deepspeed={"zero_stage": 1})
    result = train(made, lines.append)
    assert (result.steps, result.reused) == (6, False)
    steps = metrics(tmp_path)
    assert [step["step"] for step in steps] == list(range(1, 7))
    assert {step["total_steps"] for step in steps} == {6}
    assert [step["epoch"] for step in steps] == [0, 0, 0, 0, 1, 1]  # four steps an epoch, found while training
    assert steps[-1]["learning_rate"] < steps[1]["learning_rate"]
    assert any("while training" in line for line in lines)
    quarantine = (tmp_path / "runs/tiny/quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in quarantine] == ["invalid_json"]


def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_nothing_had_happened(
    finished: Finished, tmp_path: Path, tiny_model: Path
) -> None:
    killed: list[int] = []

    def kill_once(line: str) -> None:
        if "step 1/8" in line and not killed:
            killed.extend(kill_a_worker())

    config(tmp_path, tiny_model)
    made = finished.config.model_copy(
        update={"storage": str(tmp_path / "runs"), "failure": FailureSection(max_failures=1)}
    )
    result = train(made, kill_once)
    assert killed
    assert (result.steps, result.loss) == (8, finished.result.loss)
    weights = "adapter_model.safetensors"
    assert verify_bundle(result.bundle).files[weights] == verify_bundle(finished.result.bundle).files[weights]


def kill_a_worker() -> list[int]:
    """kill -9 of one training worker."""
    import os
    import signal

    import psutil

    found = [
        process
        for process in psutil.process_iter(["cmdline"])
        if "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
    ]
    for process in found[:1]:
        os.kill(process.pid, signal.SIGKILL)
    return [process.pid for process in found[:1]]


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"sources": [{"path": "ROWS"}], "max_length": 8}}, DataError, "nothing is left to train on"),
        ({"data": {"sources": [{"path": "ROWS"}], "max_bad_fraction": 0.0}}, DataError, "1 of 23 rows cannot be used"),
        ({"data": {"sources": [{"path": "NONE"}]}}, RaysftError, "there is no such file"),
        ({"lora": {"target_modules": ["nonsense"]}}, RaysftError, "target_modules"),
    ],
)
def test_a_run_that_cannot_be_ends_with_one_message_and_no_bundle(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    config(tmp_path, tiny_model)
    text = json.dumps(changes).replace("ROWS", str(tmp_path / "rows.jsonl")).replace("NONE", str(tmp_path / "none"))
    with pytest.raises(error, match=words):
        train(config(tmp_path, tiny_model, **json.loads(text)), lambda _: None)
    assert not (tmp_path / "runs/tiny/bundle").exists()
    assert not list((tmp_path / "runs").glob("tiny/checkpoint-*/manifest.json"))


@pytest.mark.usefixtures("cluster")
def test_too_many_workers_are_refused_with_what_there_is(tmp_path: Path, tiny_model: Path) -> None:
    scaling = {"num_workers": 6, "cpus_per_worker": 40, "resource_timeout_s": 3}
    with pytest.raises(
        (ConfigError, TrainingError), match=r"40 CPU each, 240 CPU together; the cluster has 8 CPU on 1"
    ):
        train(config(tmp_path, tiny_model, scaling=scaling), lambda _: None)
