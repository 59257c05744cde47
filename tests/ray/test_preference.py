"""The second stage on pairs, from `jobs.train` to a version in the registry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from jobs.train import main
from serve.registry import Registry
from serve.versions import VersionId
from sft.adapter import ADAPTER_WEIGHTS, CARD, verify_bundle

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.timeout(400)]
PAIRS = 12


def run(folder: Path, name: str, base: Path, **model: Any) -> None:
    values = {
        "name": name,
        "storage": str(folder / "runs"),
        "registry": str(folder / "registry"),
        "model": {"base": str(base), "base_id": "tiny-llama", **model},
        **({} if model else {"lora": {"rank": 4}}),
        "data": {"sources": [{"path": str(folder / "pairs.jsonl")}], "max_bad_fraction": 0.2},
        "train": {
            "stage": "dpo",
            "layout": "padded",
            "global_batch_size": 6,
            "micro_batch_size": 2,
            "learning_rate": 2e-3,
        },
        "evaluate": {"sources": [{"path": str(folder / "held.jsonl")}]},
        "scaling": {"num_workers": 2},
        "ray": {"address": "auto"},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["--config", str(path)]) == 0


def test_pairs_become_an_adapter_and_the_next_stage_goes_on_from_it(
    cluster: str, tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster
    rows = [{"prompt": f"count to {i}", "chosen": "x" * (i % 7 + 1), "rejected": "y" * (i % 5 + 1)} for i in range(16)]
    bad = {**rows[0], "rejected": rows[0]["chosen"]}
    for name, part in (("pairs", [*rows[:PAIRS], bad]), ("held", rows[PAIRS:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))

    run(tmp_path, "one", tiny_model)
    run(tmp_path, "two", tiny_model, adapter="one@v1")

    told = capsys.readouterr().out
    assert "with 6 pairs a step on 2 CPU worker(s)" in told
    assert "margin 0.000  accuracy 0.000" in told
    registry = Registry.open(tmp_path / "registry")
    first, second = (registry.download(registry.get(VersionId(name, 1)), tmp_path / name) for name in ("one", "two"))
    for name in ("one", "two"):
        steps = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        assert steps[0]["loss"] == pytest.approx(0.693147, abs=1e-4)
        assert steps[1]["loss"] < steps[0]["loss"]
        assert steps[1]["figures"]["margin"] > 0
        evaluations = [
            json.loads(line) for line in (tmp_path / "runs" / name / "evaluations.jsonl").read_text().splitlines()
        ]
        assert [(made["step"], made["sources"]["held.jsonl"]["rows"]) for made in evaluations] == [(0, 4), (2, 4)]
        assert evaluations[-1]["accuracy"] > 0.5 > evaluations[0]["accuracy"]
        quarantine = (tmp_path / "runs" / name / "quarantine.jsonl").read_text().splitlines()
        assert [json.loads(line)["reason"] for line in quarantine] == ["chosen_equals_rejected"]
        assert "preferences by DPO" in (tmp_path / "runs" / name / "report.html").read_text()
    bundles = [verify_bundle(first), verify_bundle(second)]
    assert [bundle.rank for bundle in bundles] == [4, 4]
    assert bundles[1].lineage["start"] == {"adapter": "one@v1", "weights": bundles[0].files[ADAPTER_WEIGHTS].sha256}
    assert bundles[1].lineage["evaluation"]["accuracy"] > 0.5
    assert "pairs of answers by preference (DPO)" in (second / CARD).read_text()
    before, after = (load_file(folder / ADAPTER_WEIGHTS) for folder in (first, second))
    assert before.keys() == after.keys()
    assert all(0 < abs(after[name] - before[name]).max() < 0.01 for name in before)  # two steps of 2e-3 at most
