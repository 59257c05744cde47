"""A run that gets no better: it ends before its planned steps, and its best step is the result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft.adapter import verify_bundle
from sft.trainer import train
from tests.ray.test_trainer import config, metrics

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]


def test_a_run_that_gets_no_better_ends_early_with_its_best_step(
    cluster: str, tmp_path: Path, tiny_model: Path
) -> None:
    assert cluster
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join(json.dumps({"instruction": f"say {i}", "output": "y" * i}) + "\n" for i in range(1, 6)))
    evaluate = {
        "sources": [{"path": str(held_out)}],
        "every_steps": 1,
        "early_stopping": {"patience": 2, "min_delta": 1000.0},
        "keep_best": True,
        "use": "best",
    }
    lines: list[str] = []
    made = config(tmp_path, tiny_model, evaluate=evaluate, scaling={"num_workers": 1})
    result = train(made, lines.append)
    assert [step["step"] for step in metrics(tmp_path)] == [1, 2]
    assert "ended after step 2 of 8: the held-out loss got no better" in lines
    told = [json.loads(line) for line in (tmp_path / "runs/tiny/evaluations.jsonl").read_text().splitlines()]
    assert [one["step"] for one in told] == [0, 1, 2]
    best = min(told[1:], key=lambda one: one["loss"])["step"]
    assert result.steps == best
    assert verify_bundle(result.bundle).lineage["metrics"]["steps"] == best

    again: list[str] = []
    assert train(made, again.append).reused
