from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evals.gate import Gate, Rule, Verdict, judge, read_gate, suite_digest
from sft.errors import ConfigError
from tests.evals.made import answered, made_suite, summed

GOOD = ["yes"] * 19 + ["no"]


def verdict(
    base: list[str | None], tuned: list[str | None], model: str = "tuned", /, suite: str = "yes", **rule: Any
) -> Verdict:
    asked = made_suite(20)
    summary, _ = summed([asked], answered(asked, {"base": base, "tuned": tuned}))
    return judge(Gate(rules=[Rule(suite=suite, **rule)]), summary, model)


@pytest.mark.parametrize(
    ("rule", "passed"),
    [
        ({"at_least": 0.95}, True),
        ({"at_least": 0.96}, False),
        ({"metric": "score.interval.0", "at_least": 0.9}, False),
        ({"metric": "checkers.short.mean", "at_least": 1}, True),
        ({"metric": "truncated", "at_most": 0}, True),
        ({"metric": "completion_tokens", "at_most": 39}, False),
        ({"not_worse_by": 0.2}, True),
        ({"not_worse_by": 0.02}, False),
        ({"better_by": 0.0}, False),
        ({"at_least": 0.5, "rows": 20}, True),
        ({"at_least": 0.5, "rows": 21}, False),
        ({"metric": "checkers.none.mean", "at_least": 0}, False),
        ({"metric": "failed", "at_least": 0}, False),
        ({"suite": "yse", "at_least": 0}, False),
    ],
)
def test_rules(rule: dict[str, Any], passed: bool) -> None:
    assert verdict([*GOOD], [*GOOD], **rule).passed is passed


def test_a_clear_gain_and_a_clear_loss() -> None:
    assert verdict(["no"] * 20, ["yes"] * 20, better_by=0.5).passed
    found = verdict(["yes"] * 20, [*["yes"] * 12, *["no"] * 8], not_worse_by=0.1)
    assert not found.passed
    assert found.findings[0].rows == tuple(f"r{n}" for n in range(12, 20))
    first, rows, last = found.lines()
    assert first.startswith("FAILED  yes not_worse_by 0.1: -0.400 to base on 20 rows")
    assert rows.endswith("rows: r12, r13, r14, r15, r16, r17, r18, r19")
    assert last == "tuned failed the gate"


def test_a_failed_threshold_names_its_rows() -> None:
    (finding,) = verdict([*GOOD], [*GOOD], at_least=1).findings
    assert (finding.rows, finding.reason) == (("r19",), "score.mean is 0.95")


def test_fewer_scored_rows_than_asked_fail_whatever_the_rule() -> None:
    holes: list[str | None] = [*["yes"] * 19, None]
    assert not verdict([*GOOD], holes, at_least=0).passed
    (finding,) = verdict([*GOOD], holes, at_least=0).findings
    assert finding.reason == "only 19 of 20 answers were scored (timeout: 1)"
    assert not verdict(holes, ["yes"] * 20, not_worse_by=1).passed
    assert verdict(holes, ["yes"] * 20, at_least=1).passed
    assert not verdict([], [], at_least=0).passed


def test_a_model_or_a_baseline_that_was_not_asked_fails() -> None:
    assert not verdict([*GOOD], [*GOOD], "other", at_least=0).passed
    assert not verdict([*GOOD], [*GOOD], "base", not_worse_by=1).passed


def test_a_gate_file(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("rules:\n  - {suite: general, not_worse_by: 0.05}\n  - {suite: procedures, at_least: 0.8}\n")
    assert [str(rule) for rule in read_gate(path).rules] == [
        "general not_worse_by 0.05",
        "procedures score.mean at_least 0.8",
    ]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("rules: []", "rules: List should have at least 1 item"),
        ("rules: [{suite: a}]", "give one of at_least, at_most, not_worse_by, better_by, got 0"),
        ("rules: [{suite: a, at_least: 1, at_most: 2}]", "got 2"),
        ("rules: [{suite: a, atleast: 1}]", "rules.0.atleast: no such key"),
        ("rules: [{suite: a, metric: truncated, better_by: 1}]", "leave metric out"),
    ],
)
def test_a_wrong_gate_file_is_refused(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=fault):
        read_gate(path)


def test_suites_are_beside_the_gate_file(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("suites: [a.yaml, /else/b.yaml]\nrules: [{suite: a, at_least: 1}]\n")
    found = read_gate(path)
    assert (found.suites, found.baseline) == ([tmp_path / "a.yaml", Path("/else/b.yaml")], "current")


def test_a_suite_s_digest_is_of_all_that_decides_its_scores() -> None:
    suite = made_suite()
    others = [
        made_suite(rows=3),
        made_suite(samples=2),
        made_suite(name="other"),
        replace(suite, score="mean"),
        replace(suite, rows=(replace(suite.rows[0], reference="yes"), *suite.rows[1:])),
    ]
    assert suite_digest(made_suite()) == suite_digest(replace(suite, description="Else.")) == suite_digest(suite)
    assert len({suite_digest(one) for one in (suite, *others)}) == 6
