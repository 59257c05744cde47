"""The loop as one job: what is refused before it begins, what a version is compared with, and its page."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from evals.summary import Mean, ModelSummary, Paired, SuiteSummary, Summary
from jobs import pipeline
from jobs.pipeline import PipelineConfig, PipelineError, baseline, check
from jobs.pipeline_page import Loop, change, page
from serve.evaluations import Evaluation, ModelScore, RuleResult, SuiteScore
from serve.versions import AliasEntry, VersionId
from sft.errors import ConfigError

CONFIGS = Path("jobs/configs")
V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))
NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)


def config(tmp_path: Path, **changes: Any) -> PipelineConfig:
    values: dict[str, Any] = {
        "train": CONFIGS / "support-train.yaml",
        "alias": "support",
        "suite": ["evals/suites/general.yaml"],
        "gate": CONFIGS / "support-gate.yaml",
        "output": tmp_path,
    }
    return PipelineConfig.model_validate(values | changes)


def test_a_sound_pipeline(tmp_path: Path) -> None:
    plan = check(config(tmp_path))
    assert (plan.registry, plan.generation, plan.training.name) == ("build/demo/registry", None, "support")


def test_all_faults_at_once_and_before_anything_runs(tmp_path: Path) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("rules: [{suite: general}]\n")
    generation = tmp_path / "generate.yaml"
    generation.write_text(f"{{target: 10, output: {tmp_path / 'made'}, teacher: {{model: teacher}}, oops: 1}}\n")
    with pytest.raises(ConfigError) as caught:
        check(
            config(
                tmp_path,
                alias="a b",
                train=CONFIGS / "demo-train.yaml",
                gate=gate,
                suite=["/no/such.yaml"],
                generate=generation,
            )
        )
    text = str(caught.value)
    for part in ("a b", "leave `alias` out", "at_least", "/no/such.yaml", "oops"):
        assert part in text
    assert len(caught.value.faults) == 5


def test_what_is_generated_must_be_trained_on(tmp_path: Path) -> None:
    generation = tmp_path / "generate.yaml"
    generation.write_text(f"{{target: 10, output: {tmp_path / 'made'}, teacher: {{model: teacher}}}}\n")
    with pytest.raises(ConfigError, match=r"none of data\.sources has the path .*made/rows\.jsonl"):
        check(config(tmp_path, generate=generation))


def test_without_a_server_nothing_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "STAGES", {})
    words = ["--config", str(CONFIGS / "support-pipeline.yaml"), "--endpoint", "http://127.0.0.1:9", "--output"]
    with pytest.raises(Exception, match="nobody answers"):
        pipeline.main([*words, str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def entry(number: int, version: VersionId, previous: VersionId | None, action: Any = "promote") -> AliasEntry:
    return AliasEntry(
        number=number, alias="live", action=action, version=version, previous=previous, at=NOW, by="anna", reason="why"
    )


def test_baseline() -> None:
    first, second = entry(1, V1, None), entry(2, V2, V1)
    assert baseline([], V1) is None
    assert baseline([first], V2) == V1
    assert baseline([first], V1) is None  # promoted before there was anything
    assert baseline([first, second], V2) == V1  # promoted already: compared with what it replaced
    assert baseline([first, second], V3) == V2


def test_what_was_taken_back_is_not_brought_back() -> None:
    history = [entry(1, V1, None), entry(2, V2, V1), entry(3, V1, V2, "rollback")]
    with pytest.raises(PipelineError, match=r"live served support@v2 before, and serves support@v1 since its entry 3"):
        baseline(history, V2)


def paired(low: float, high: float) -> Paired:
    return Paired(
        model="support@v1",
        suite="general",
        rows=9,
        difference=(low + high) / 2,
        interval=(low, high),
        p=None,
        better=[],
        worse=[],
        prompt_tokens_saved=None,
    )


@pytest.mark.parametrize(
    ("interval", "said"),
    [((0.1, 0.3), "better"), ((-0.3, -0.1), "worse"), ((-0.1, 0.3), "unclear"), ((0.0, 0.2), "unclear")],
)
def test_a_change_is_one_where_its_whole_interval_says_so(interval: tuple[float, float], said: str) -> None:
    assert change(paired(*interval)) == said
    assert change(None) == "unclear"


def model(mean: float, against: Paired | None = None) -> ModelSummary:
    return ModelSummary(
        asked=9,
        scored=9,
        unscored={},
        score=Mean(rows=9, mean=mean, interval=(0.0, 1.0)),
        checkers={},
        failed=[],
        truncated=0,
        with_rationale=0,
        with_final=0,
        prompt_tokens=1,
        completion_tokens=1,
        uncounted=0,
        paired=against,
        across=None,
    )


def loop(tmp_path: Path, passed: bool) -> Loop:
    suite = SuiteSummary(
        description="Plain <questions>.",
        rows=9,
        samples=1,
        models={"support@v1": model(0.5), "support@v2": model(0.75, paired(0.1, 0.4))},
    )
    models = ["support@v1", "support@v2"]
    score = ModelScore(asked=9, scored=9, rows=9, mean=0.5, interval=(0.0, 1.0))
    SuiteScore(fingerprint="0" * 64, version=score, baseline=score, difference=None, interval=None)
    findings = Evaluation(
        number=1,
        version=V2,
        at=NOW,
        by="anna",
        gate="0" * 64,
        baseline="support@v1",
        suites={
            "general": SuiteScore(fingerprint="0" * 64, version=score, baseline=score, difference=None, interval=None)
        },
        rules=(RuleResult(rule="general at_least 0.9", passed=passed, reason="score.mean is 0.75", rows=("row-7",)),),
        passed=passed,
    )
    return Loop(
        alias="support",
        endpoint="http://127.0.0.1:8000",
        version=V2,
        before=V1,
        compared="support@v1",
        evaluation=Summary(baseline=models[0], models=models, thinking=None, suites={"general": suite}),
        evaluated=tmp_path / "evaluation" / "x",
        findings=findings,
        entry=entry(2, V2, V1) if passed else None,
        fault="" if passed else "support@v2 failed the gate",
        seconds={"train": 61.0},
    )


def test_the_page_of_a_promotion(tmp_path: Path) -> None:
    text = page(loop(tmp_path, passed=True), tmp_path)
    assert "<b>support</b> answers with support@v2, instead of support@v1" in text
    assert "python -m jobs.adapters rollback support --endpoint http://127.0.0.1:8000" in text
    for part in ("50%", "75%", "+25", "better", "Plain &lt;questions&gt;.", 'href="evaluation/x/report.html"', "1:01"):
        assert part in text
    assert "row-7" not in text


def test_the_page_of_a_refusal_says_that_nothing_changed(tmp_path: Path) -> None:
    text = page(loop(tmp_path, passed=False), tmp_path)
    assert "<b>support</b> has not changed: it answers with support@v1" in text
    assert "support@v2 did not pass its gate" in text
    assert "row-7" in text
    assert "rollback" not in text


def test_the_page_of_a_loop_that_hardly_began(tmp_path: Path) -> None:
    bare = replace(Loop(alias="support", endpoint="http://x"), fault="no <room>")
    text = page(bare, tmp_path)
    assert "did not come to its end" in text
    assert "no &lt;room&gt;" in text
