"""Data that is generated through Ray Data, and a model that is trained on it."""

from __future__ import annotations

from pathlib import Path

import pytest

from generate.run import generate
from sft.trainer import train
from tests.evals.endpoint import Endpoint, served
from tests.generate.scripted import made_config, reply
from tests.generate.test_run import Scripted, files
from tests.ray.test_trainer import config

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]


def test_ray_makes_the_rows_that_one_process_makes(cluster: str, tmp_path: Path) -> None:
    assert cluster
    with served(Endpoint(reply)) as endpoint:
        teacher = {"url": endpoint.url, "workers": 2, "concurrency": 4}
        made = made_config(tmp_path / "ray", teacher=teacher, requests_per_round=12)
        summary = generate(made, "sk-ray", lambda _: None)
        assert endpoint.keys == {"Bearer sk-ray"}
        assert (summary.complete, len(endpoint.asked)) == (True, summary.requests.asked)
    alone = made_config(tmp_path / "alone", requests_per_round=12)
    generate(alone, None, lambda _: None, Scripted())
    assert files(made.output) == files(alone.output)


@pytest.mark.long
def test_a_model_is_trained_on_generated_rows(cluster: str, tmp_path: Path, tiny_model: Path) -> None:
    assert cluster
    made = made_config(tmp_path / "made")
    assert generate(made, None, lambda _: None, Scripted()).complete
    training = config(
        tmp_path,
        tiny_model,
        data={"sources": [{"path": str(made.output / "rows.jsonl")}]},
        train={"max_steps": 2, "global_batch_size": 4, "learning_rate": 1e-2},
        scaling={"num_workers": 1},
        checkpoint={"num_to_keep": 1},
    )
    assert train(training, lambda _: None).steps == 2


def test_a_refusal_reaches_the_driver_through_ray(cluster: str, tmp_path: Path) -> None:
    assert cluster
    with served(Endpoint(lambda *_: (401, {}, ""))) as endpoint:
        made = made_config(tmp_path, teacher={"url": endpoint.url, "workers": 1})
        summary = generate(made, None, lambda _: None)
    assert "RAYSFT_API_KEY" in summary.stopped
