from __future__ import annotations

from pathlib import Path

import pytest

from evals.errors import EvaluationError
from evals.scoring import score_all
from evals.summary import read_summary
from tests.evals.made import MODELS, answered, made_suite, summed


def test_means_pairs_and_tokens() -> None:
    suite = made_suite()
    records = answered(suite, {"base": ["yes", "no", "no", "yes"], "tuned": ["yes", "yes", "Oh yes", "no"]})
    summary, _ = summed([suite], records)
    base, tuned = (summary.suites["yes"].models[model] for model in MODELS)
    assert (base.score.mean, tuned.score.mean) == (0.5, 0.75)
    assert (base.paired, base.failed, tuned.failed) == (None, ["r1", "r2"], ["r3"])
    assert (base.prompt_tokens, base.completion_tokens, base.truncated, base.uncounted) == (40, 8, 0, 0)
    assert (base.checkers["yes"].mean, base.checkers["short"].mean) == (0.5, 1)
    assert tuned.paired is not None
    assert (tuned.paired.rows, tuned.paired.difference, tuned.paired.p) == (4, 0.25, 1.0)
    assert (tuned.paired.better, tuned.paired.worse) == (["r1", "r2"], ["r3"])
    assert summary.complete


def test_what_failed_is_in_no_mean_and_no_pair() -> None:
    suite = made_suite()
    records = answered(suite, {"base": ["yes", None, "no"], "tuned": ["yes", "no", None, "yes"]})
    summary, _ = summed([suite], records)
    base, tuned = (summary.suites["yes"].models[model] for model in MODELS)
    assert (base.asked, base.scored, base.unscored) == (4, 2, {"timeout": 1, "not_asked": 1})
    assert (base.score.rows, base.score.mean) == (2, 0.5)
    assert tuned.paired is not None
    assert (tuned.paired.rows, tuned.paired.difference) == (1, 0.0)
    assert not summary.complete


def test_without_any_score_there_is_no_number() -> None:
    summary, _ = summed([made_suite()], {})
    tuned = summary.suites["yes"].models["tuned"]
    assert (tuned.score.mean, tuned.score.interval, tuned.unscored) == (None, None, {"not_asked": 4})
    assert tuned.paired is not None
    assert (tuned.paired.rows, tuned.paired.difference, tuned.paired.interval, tuned.paired.p) == (0, None, None, None)


def test_samples_are_averaged_by_row() -> None:
    suite = made_suite(2, samples=2)
    summary, _ = summed(
        [suite], answered(suite, {"base": ["yes", "no", "no", "no"], "tuned": ["yes", "yes", "no", None]})
    )
    base, tuned = (summary.suites["yes"].models[model] for model in MODELS)
    assert (base.score.rows, base.score.mean, base.asked) == (2, 0.25, 4)
    assert (tuned.score.mean, tuned.scored) == (0.5, 3)
    assert tuned.paired is not None
    assert tuned.paired.p is None


def test_a_short_prompt_against_the_baseline_on_a_long_one() -> None:
    short, long = made_suite(2, "short", against="long"), made_suite(2, "long")
    records = answered(short, {"base": ["no", "no"], "tuned": ["yes", "yes"]}, prompt_tokens=10)
    records |= answered(long, {"base": ["yes", "no"], "tuned": ["yes", "yes"]}, prompt_tokens=310)
    summary, _ = summed([short, long], records)
    across = summary.suites["short"].models["tuned"].across
    assert across is not None
    assert (across.model, across.suite, across.difference, across.better) == ("base", "long", 0.5, ["r1"])
    assert across.prompt_tokens_saved == 300
    assert summary.suites["long"].models["tuned"].across is None
    assert summed([short], records)[0].suites["short"].models["tuned"].across is None


def test_answers_to_another_request_do_not_count() -> None:
    suite = made_suite(1)
    records = answered(suite, {"base": ["yes"], "tuned": ["yes"]})
    assert {one.unscored for one in score_all([suite], MODELS, records, True)} == {"not_asked"}


def test_a_summary_is_read_back(tmp_path: Path) -> None:
    suite = made_suite()
    summary, _ = summed([suite], answered(suite, {"base": ["yes"] * 4, "tuned": ["no"] * 4}))
    path = tmp_path / "summary.json"
    path.write_text(summary.model_dump_json(), encoding="utf-8")
    assert read_summary(path) == summary
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(EvaluationError, match="is no summary"):
        read_summary(path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_summary(tmp_path / "none.json")
