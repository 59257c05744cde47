from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.errors import EvaluationError
from jobs.evaluate import main
from tests.evals.endpoint import Endpoint, served

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def reply(body: dict[str, Any], _: int) -> str:
    """The base is right on even rows, the tuned one on all but the last ten."""
    number = int(body["messages"][-1]["content"].split()[-1])
    return "yes" if number < 90 or (body["model"] == "base" and number % 2 == 0) else "no"


def evaluate(folder: Path, url: str, output: str, *more: str) -> int:
    options = ["--url", url, "--models", "base,tuned", "--suite", str(folder / "suite.yaml")]
    return main([*options, "--output", str(folder / output), "--tries", "1", *more])


def test_tasks_on_ray_make_the_same_files(tmp_path: Path) -> None:
    rows = [{"id": f"r{n}", "prompt": f"Is it {n}"} for n in range(100)]
    checkers = {"yes": {"kind": "contains", "reference": "yes"}}
    suite = {"name": "even", "description": "Is it?", "checkers": checkers, "rows": rows}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    with served(Endpoint(reply)) as endpoint:
        assert evaluate(tmp_path, endpoint.url, "alone") == 0
        assert evaluate(tmp_path, endpoint.url, "spread", "--workers", "2") == 0
        assert len(endpoint.asked) == 400
        assert evaluate(tmp_path, endpoint.url, "spread", "--workers", "2") == 0
        assert len(endpoint.asked) == 400
    for name in ("scores.jsonl", "summary.json", "report.html"):
        assert (tmp_path / "spread" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_an_unknown_model_ends_the_tasks_with_one_message(tmp_path: Path) -> None:
    rows = [{"id": "r", "prompt": "?", "reference": "a"}]
    suite = {"name": "a", "description": "A.", "checkers": {"a": {"kind": "exact"}}, "rows": rows}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite), encoding="utf-8")
    refuse = Endpoint(lambda *_: (404, {}, '{"error": {"message": "no model base"}}'))
    with served(refuse) as endpoint, pytest.raises(EvaluationError, match="no model base"):
        evaluate(tmp_path, endpoint.url, "out", "--workers", "2")
