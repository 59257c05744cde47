from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from evals.errors import EvaluationError, SuiteError
from evals.summary import read_summary
from jobs import cli
from jobs.evaluate import main
from sft.errors import ConfigError
from tests.evals.endpoint import Endpoint, served

EVIL = "<script>alert('x')</script> & \" yes"


def reply(body: dict[str, Any], _: int) -> Any:
    """The base is right on even rows, the tuned one on all but the last."""
    number = int(body["messages"][-1]["content"].split()[-1].rstrip("?"))
    right = number % 2 == 0 if body["model"] == "base" else number < 5
    return f"<think>I see {EVIL}</think>{EVIL}" if right else "no"


def suite(folder: Path, rows: int = 6, **changed: Any) -> Path:
    path = folder / "suite.yaml"
    values = {
        "name": "even",
        "description": "Is it right?",
        "checkers": {"yes": {"kind": "contains", "reference": "yes"}, "brief": {"kind": "length", "max": 9}},
        "rows": [{"id": f"r{n}", "prompt": f"{EVIL} {n}?"} for n in range(rows)],
    }
    path.write_text(yaml.safe_dump({**values, **changed}), encoding="utf-8")
    return path


def evaluate(folder: Path, url: str, *more: str) -> int:
    options = ["--url", url, "--models", "base,tuned", "--suite", str(folder / "suite.yaml")]
    return main([*options, "--output", str(folder / "out"), "--concurrency", "3", "--tries", "1", *more])


def test_an_evaluation_from_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSFT_API_KEY", "sk-test")
    suite(tmp_path)
    gate = tmp_path / "gate.yaml"
    gate.write_text("rules: [{suite: even, at_least: 0.8}, {suite: even, not_worse_by: 0.9}]")
    with served(Endpoint(reply)) as endpoint:
        assert evaluate(tmp_path, endpoint.url, "--gate", str(gate), "--thinking", "true") == 0
    assert endpoint.keys == {"Bearer sk-test"}
    assert {one["chat_template_kwargs"]["enable_thinking"] for one in endpoint.asked} == {True}
    models = read_summary(tmp_path / "out" / "summary.json").suites["even"].models
    assert (models["base"].score.mean, models["tuned"].score.mean) == (0.5, 5 / 6)
    assert models["tuned"].paired is not None
    assert (models["tuned"].paired.better, models["tuned"].paired.worse) == (["r1", "r3"], [])
    assert models["tuned"].with_rationale == 5
    said = capsys.readouterr().out
    assert "to base: +33.3 points" in said
    assert "tuned passed the gate" in said
    scores = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert len(scores) == 12
    assert (scores[0]["answer"], scores[0]["rationale"], scores[0]["score"]) == (EVIL, f"I see {EVIL}", 1.0)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert" in page
    assert "2 rows got better" in page
    assert "http" not in page.replace("http-equiv", "")


def test_two_jobs_do_not_write_one_evaluation(tmp_path: Path) -> None:
    suite(tmp_path, rows=1)
    refused: list[str] = []

    def reply_meanwhile(body: dict[str, Any], before: int) -> Any:
        with pytest.raises(EvaluationError) as caught:
            evaluate(tmp_path, "http://127.0.0.1:9/v1")
        refused.append(str(caught.value))
        return reply(body, before)

    with served(Endpoint(reply_meanwhile)) as endpoint:
        assert evaluate(tmp_path, endpoint.url) == 0
    assert len(refused) == 2
    assert all("another job writes on it now" in told for told in refused)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 2


def test_a_second_run_asks_only_what_is_missing(tmp_path: Path) -> None:
    suite(tmp_path)
    broken = {"r1", "r4"}

    def failing(body: dict[str, Any], before: int) -> Any:
        row = "r" + body["messages"][-1]["content"].split()[-1].rstrip("?")
        return (500, {}, "") if row in broken and body["model"] == "tuned" else reply(body, before)

    with served(Endpoint(failing)) as endpoint:
        assert evaluate(tmp_path, endpoint.url) == 1
        tuned = read_summary(tmp_path / "out" / "summary.json").suites["even"].models["tuned"]
        assert (tuned.asked, tuned.scored, tuned.unscored) == (6, 4, {"http_500": 2})
        assert "2 of 12 answers have no score" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
        endpoint.asked.clear()
        broken.clear()
        assert evaluate(tmp_path, endpoint.url) == 0
        assert [one["model"] for one in endpoint.asked] == ["tuned", "tuned"]
        endpoint.asked.clear()
        suite(tmp_path, checkers={"no": {"kind": "contains", "reference": "no"}})  # other checkers, same questions
        assert evaluate(tmp_path, endpoint.url) == 0
        assert endpoint.asked == []
        suite(tmp_path, generation={"max_tokens": 9})
        assert evaluate(tmp_path, endpoint.url, "--max_rows", "2") == 0
        assert len(endpoint.asked) == 4


def test_a_gate_that_fails_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite(tmp_path)
    gate = tmp_path / "gate.yaml"
    gate.write_text("rules: [{suite: even, at_least: 0.9}]")
    with served(Endpoint(reply)) as endpoint:
        assert evaluate(tmp_path, endpoint.url, "--gate", str(gate)) == 1
    said = capsys.readouterr().out
    assert "FAILED  even score.mean at_least 0.9" in said
    assert "rows: r5" in said
    assert "tuned failed the gate" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8").replace("\n", " ")


def test_nothing_is_asked_where_something_is_wrong(tmp_path: Path) -> None:
    suite(tmp_path, checkers={"yes": {"kind": "telepathy"}})
    with served(Endpoint(reply)) as endpoint:
        with pytest.raises(SuiteError, match="telepathy"):
            evaluate(tmp_path, endpoint.url)
        suite(tmp_path)
        with pytest.raises(ConfigError, match="only once"):
            main(["--models", "a,a", "--suite", str(tmp_path / "suite.yaml"), "--output", str(tmp_path / "out")])
        with pytest.raises(ConfigError, match="no such option"):
            evaluate(tmp_path, endpoint.url, "--concurency", "4")
        assert endpoint.asked == []
    assert not (tmp_path / "out").exists()


def test_an_unknown_model_ends_it_with_one_message(tmp_path: Path) -> None:
    suite(tmp_path)
    with (
        served(Endpoint(lambda *_: (404, {}, '{"error": {"message": "no model base"}}'))) as endpoint,
        pytest.raises(EvaluationError, match="no model base"),
    ):
        evaluate(tmp_path, endpoint.url)


def test_a_wrong_suite_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite(tmp_path, rows=0)
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: evaluate(tmp_path, "http://127.0.0.1:9/v1"))
    assert ended.value.code == 2
    assert "suite.yaml: there are no rows" in capsys.readouterr().err
