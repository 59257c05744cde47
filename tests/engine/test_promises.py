"""The promises from end to end with tiny settings: real model, trainer, endpoint; two rows of each suite."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.promises import PROMISES
from tests.ports import free_port

pytest.importorskip("reasoning_gym", exc_type=ImportError)
pytestmark = [pytest.mark.engine, pytest.mark.long, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "jobs" / "configs"


def changed(path: Path, target: Path, **sections: Any) -> str:
    """A shipped config with other values, written elsewhere."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, value in sections.items():
        values[name] = {**values[name], **value} if isinstance(value, dict) else value
    target.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(target)


def test_the_six_promises_are_measured_and_a_second_run_does_nothing_again(demo_model: Path, tmp_path: Path) -> None:
    places = {"registry": str(tmp_path / "registry")}
    base = {"base": str(demo_model)}
    plan = yaml.safe_load((CONFIGS / "promises.yaml").read_text(encoding="utf-8"))
    for name, path in plan["adapters"].items():
        sections: dict[str, Any] = {
            "model": base,
            "train": {"max_steps": 1},
            "storage": str(tmp_path / "runs"),
            **places,
        }
        file = changed(ROOT / path, tmp_path / f"{name}-train.yaml", **sections)
        if name == "tasks":
            values = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            values["data"]["sources"][0]["path"] = str(tmp_path / "tasks/*/*.jsonl")
            Path(file).write_text(yaml.safe_dump(values), encoding="utf-8")
        plan["adapters"][name] = file
    http = {"port": free_port()}
    plan["serve"] = changed(ROOT / plan["serve"], tmp_path / "serve.yaml", base=str(demo_model), http=http, **places)
    plan["tasks"] |= {"folder": str(tmp_path / "tasks"), "rows": 10, "asked_trained": 1, "asked_held_out": 1}
    plan |= {"output": str(tmp_path / "out"), "seeds": [5], "max_rows": 2}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    command = [sys.executable, "-m", "jobs.promises", "--config", str(tmp_path / "plan.yaml")]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == [*(promise.key for promise in PROMISES), "about"]
    for promise in PROMISES:
        found = summary[promise.key]
        assert found["rows"] == 2 * len(promise.measures[0].after.suites)
        assert 0 <= found["base"] <= 1
        assert 0 <= found["tuned"] <= 1
        assert found["interval"][0] <= found["difference"] <= found["interval"][1]
        assert found["seeds"] == [5]
    assert summary["zero_shot_transfer"]["data_report"]["held_out"]["clusters"] == ["geometry", "graphs", "logic"]
    assert summary["zero_shot_transfer"]["proof"]["held_out_clusters"] == ["geometry", "graphs", "logic"]
    assert (tmp_path / "out" / "report.html").is_file()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert "ready at" not in second.stdout
    again = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
    assert {key: again[key] for key in again if key != "about"} == {
        key: summary[key] for key in summary if key != "about"
    }
