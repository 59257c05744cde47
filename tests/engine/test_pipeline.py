"""The whole loop as jobs on a cluster that serves: data from a teacher, training, evaluation, gate, promotion."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.config import ServeConfig
from serve.registry import Registry
from serve.versions import VersionId
from tests.engine.conftest import BASE, GUARD, Endpoint
from tests.engine.test_gate import SUITE, check_guard
from tests.evals.endpoint import Endpoint as Teacher
from tests.evals.endpoint import served
from tests.generate.scripted import reply
from tests.heads import ROOT, Head, job_id, ray_head, ray_job, submit_here
from tests.load import Load, until
from tests.ports import free_port

pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(1200)]
KEPT = "rules: [{suite: capitals, not_worse_by: 1.0, rows: 4}, {suite: capitals, at_least: 0.0}]"
HARD = "rules: [{suite: capitals, metric: checkers.right.mean, at_least: 1.0}, {suite: capitals, at_least: 1.0}]"


@dataclass(frozen=True)
class Place:
    """A cluster with a server on it, and the folder of the pipeline's files."""

    head: Head
    endpoint: Endpoint
    folder: Path
    teacher: Teacher

    @property
    def registry(self) -> Registry:
        return self.endpoint.registry

    @property
    def url(self) -> str:
        return self.endpoint.url

    def write(self, name: str, values: dict[str, Any]) -> str:
        path = self.folder / name
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return str(path)

    def pipeline(self, name: str, demo_model: Path, rules: str, **train: Any) -> str:
        """Writes a pipeline with all that it names."""
        (self.folder / f"{name}-gate.yaml").write_text(f"suites: [capitals.yaml]\n{rules}\n")
        training = {
            "name": "made",
            "storage": str(self.folder / f"{name}-runs"),
            "registry": self.registry.address,
            "model": {"base": str(demo_model), "base_id": BASE},
            "lora": {"rank": 4, "alpha": 8},
            "data": {"sources": [{"path": str(self.folder / "made/rows.jsonl")}], "max_length": 256},
            "train": {"max_steps": 20, "global_batch_size": 2, "micro_batch_size": 1, "learning_rate": 1e-5, **train},
            "scaling": {"num_workers": 1},
            "checkpoint": {"every_steps": 2},
        }
        teacher = {"url": self.teacher.url, "model": "teacher", "workers": 1, "concurrency": 4}
        generation = {"output": str(self.folder / "made"), "target": 12, "requests_per_round": 6, "teacher": teacher}
        return self.write(
            f"{name}.yaml",
            {
                "generate": self.write("generate.yaml", generation),
                "train": self.write(f"{name}-train.yaml", training),
                "endpoint": self.url,
                "alias": "live",
                "suite": [str(self.folder / "capitals.yaml")],
                "gate": str(self.folder / f"{name}-gate.yaml"),
                "output": str(self.folder / name),
            },
        )

    def run(self, file: str, *, wait: bool = True) -> tuple[int, str]:
        return submit_here(self.head, sys.executable, "-m", "jobs.pipeline", "--config", file, wait=wait)


@pytest.fixture(scope="module")
def place(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "capitals.yaml").write_text(SUITE)
    registry = Registry.open(folder / "registry", create=True)
    with ray_head(folder) as head, served(Teacher(reply)) as teacher, serving(head, registry, demo_model) as endpoint:
        yield Place(head, endpoint, folder, teacher)


@contextmanager
def serving(head: Head, registry: Registry, demo_model: Path) -> Iterator[Endpoint]:
    """`python -m jobs.serve` on the cluster, with two gateways."""
    values: dict[str, Any] = {
        "registry": registry.address,
        "base": str(demo_model),
        "base_id": BASE,
        "engine": {"max_model_len": 512, "max_lora_rank": 16},
        "scaling": {"gateway_replicas": 2},
        "guard": GUARD,
        "http": {"port": free_port()},
        "ray": {"address": head.address},
    }
    config = ServeConfig.model_validate(values)
    file = Path(registry.address.removeprefix("file://")).parent / "serve.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    log = file.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.serve", "--config", str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=head.environment,
        )
    try:
        until(lambda: "stop: Ctrl-C" in log.read_text() or process.poll() is not None, 400)
        assert process.poll() is None, log.read_text()[-4000:]
        url = f"http://127.0.0.1:{config.http.port}"
        with httpx.Client(base_url=url, timeout=120) as client:
            yield Endpoint(url, config, registry, client)
    finally:
        process.terminate()
        process.wait(120)


def answers(place: Place, model: str) -> str:
    """Which version answers."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, "temperature": 0}
    answer = place.endpoint.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-raysft-version"]


def test_a_version_from_generated_rows_goes_through_the_gate(place: Place, demo_model: Path) -> None:
    file = place.pipeline("first", demo_model, KEPT)
    code, said = place.run(file, wait=False)
    assert code == 0, said
    run = place.folder / "first-runs/made"
    until(lambda: any(run.glob("checkpoint-*/manifest.json")), 300)
    code, said = ray_job(place.head.dashboard, "stop", job_id(said), environment=place.head.environment)
    assert code == 0, said
    assert place.registry.versions("made") == []
    asked = len(place.teacher.asked)
    assert asked > 0

    code, said = place.run(file)  # goes on in the middle of the training, with the rows that are there
    assert code == 0, said[-4000:]
    assert len(place.teacher.asked) == asked
    assert "going on after step" in said
    assert "published made@v1" in said
    (entry,) = place.registry.history("live")
    assert (entry.version, entry.action, entry.evaluation) == (VersionId("made", 1), "promote", 1)
    assert answers(place, "live") == "made@v1"
    version = place.registry.get(VersionId("made", 1))
    assert version.bundle.lineage["data"]["kept"] == 12
    summary = json.loads((place.folder / "first/evaluation" / f"made@v1-{BASE}" / "summary.json").read_text())
    assert set(summary["suites"]["capitals"]["models"]) == {BASE, "made@v1"}
    page = (place.folder / "first/report.html").read_text(encoding="utf-8")
    assert "made@v1" in page

    began = time.monotonic()
    code, said = place.run(file)  # nothing is left to do
    assert code == 0, said[-4000:]
    assert "published before: made@v1" in said
    assert len(place.teacher.asked) == asked
    assert place.registry.history("live") == [entry]
    assert time.monotonic() - began < 120


def test_a_version_that_fails_its_gate_changes_nothing_for_users(place: Place, demo_model: Path) -> None:
    served_now = answers(place, "live")
    before = place.registry.history("live")
    file = place.pipeline("second", demo_model, HARD, learning_rate=0.1, max_steps=4)
    with Load(place.url, ["live"], 2) as load:
        load.more(2)
        code, said = place.run(file)
        load.more(2)
    assert code == 1, said[-4000:]
    assert "FAILED  capitals" in said
    assert place.registry.history("live") == before
    assert (load.faults, load.torn) == ([], [])
    assert {heard.version for heard in load.whole} == {served_now}
    (kept,) = place.registry.evaluations(VersionId("made", 2))
    assert not kept.passed
    assert "made@v2" in (place.folder / "second/report.html").read_text(encoding="utf-8")


def test_two_gateways_take_a_version_back_once(place: Place, bundles: Callable[[int], Path]) -> None:
    check_guard(place.endpoint, bundles)
    families = text_string_to_metric_families(place.endpoint.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    asked = {
        sample.labels["replica"]
        for sample in samples
        if sample.name == "raysft_requests_total" and sample.labels["model"] == "guarded" and sample.value
    }
    assert len(asked) == 2
    assert sum(sample.value for sample in samples if sample.name == "raysft_guard_rollbacks_total") == 1
