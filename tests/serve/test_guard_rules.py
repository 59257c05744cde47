from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serve.config import GuardSection, ServeConfig
from serve.guard_counts import STEP, Counts, Tally, class_of, p95
from serve.guard_rules import Breach, Watch, judge, watch_of
from serve.versions import AliasEntry, Canary, Shadow, VersionId

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))
NOW = datetime(2026, 1, 2, tzinfo=UTC)
WATCH = Watch("support", 2, V2, V1, canary=False)
ALL: dict[str, dict[str, Any]] = {
    "error_rate": {"at_most": 0.1, "above_before": 0.05},
    "first_token_p95_s": {"at_most": 5, "times_before": 2},
    "total_p95_s": {"at_most": 60, "times_before": 1.5, "above_before": 10},
    "checkers": {"json": {"check": {"kind": "json"}, "at_least": 0.8, "below_before": 0.1}},
}


def section(**fields: Any) -> GuardSection:
    return GuardSection.model_validate({"min_requests": 10, **fields})


def entry(action: str = "promote", **changes: Any) -> AliasEntry:
    made = {"number": 2, "alias": "support", "action": action, "version": V2, "previous": V1, "back_to": 1}
    return AliasEntry.model_validate({**made, "at": NOW - timedelta(seconds=5), "by": "me", **changes})


def of(seconds: float, count: int = 10) -> dict[int, int]:
    return {class_of(seconds): count}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, WATCH),
        ({"at": NOW - timedelta(seconds=60)}, None),
        ({"at": NOW + timedelta(seconds=60)}, WATCH),  # another machine's clock
        ({"previous": None, "back_to": None}, None),
        ({"previous": V2}, None),
        ({"action": "rollback"}, None),
        ({"action": "shadow", "shadow": Shadow(version=V3, share=0.5, since=2)}, None),
        (
            {"action": "canary", "canary": Canary(version=V3, weight=0.5, since=1), "at": NOW - timedelta(days=9)},
            Watch("support", 1, V3, V2, canary=True),
        ),
    ],
)
def test_who_is_on_probation(changes: dict[str, Any], expected: Watch | None) -> None:
    assert watch_of(entry(**changes), NOW, 60) == expected


@pytest.mark.parametrize(
    ("limits", "counts", "before", "expected"),
    [
        (
            {"error_rate": {"at_most": 0.1}},
            Counts(10, 2),
            Counts(),
            Breach("error_rate", "2 of 10 requests failed, 0.2 above 0.1"),
        ),
        ({"error_rate": {"at_most": 0.2}}, Counts(10, 2), Counts(), None),
        ({"error_rate": {"at_most": 0.1}}, Counts(9, 9), Counts(), None),
        (
            {"error_rate": {"above_before": 0.1}},
            Counts(10, 4),
            Counts(20, 4),
            Breach("error_rate", "4 of 10 requests failed, 0.4 more than 0.1 above the 0.2 of support@v1"),
        ),
        ({"error_rate": {"above_before": 0.1}}, Counts(10, 4), Counts(9, 0), None),
        (
            {"first_token_p95_s": {"times_before": 2}},
            Counts(20, 0, of(0.9)),
            Counts(20, 0, of(0.3)),
            Breach(
                "first_token",
                "the p95 of the times to the first token is 0.926 s above 2 times the 0.301 of support@v1",
            ),
        ),
        ({"first_token_p95_s": {"times_before": 4}}, Counts(20, 0, of(0.9)), Counts(20, 0, of(0.3)), None),
        ({"first_token_p95_s": {"at_most": 0.1}}, Counts(20, 0, of(0.9, 9)), Counts(), None),
        (
            {"total_p95_s": {"at_most": 5}},
            Counts(10, 0, {}, of(9)),
            Counts(),
            Breach("total", "the p95 of the times of answers is 9.17 s above 5"),
        ),
        (
            {"checkers": {"json": {"check": {"kind": "json"}, "at_least": 0.9}}},
            Counts(40, 0, checks={"json": (10, 8.0)}),
            Counts(),
            Breach("checker", "checker json scores 10 answers 0.8 below 0.9"),
        ),
        (
            {"checkers": {"json": {"check": {"kind": "json"}, "below_before": 0.1}}},
            Counts(40, 0, checks={"json": (10, 8.0)}),
            Counts(40, 0, checks={"json": (20, 19.0)}),
            Breach("checker", "checker json scores 10 answers 0.8 more than 0.1 below the 0.95 of support@v1"),
        ),
        (
            {"checkers": {"json": {"aliases": ["sales*"], "check": {"kind": "json"}, "at_least": 0.9}}},
            Counts(40, 0, checks={"json": (10, 0.0)}),
            Counts(),
            None,
        ),
        ({}, Counts(100, 100), Counts(), None),
    ],
)
def test_limits(limits: dict[str, Any], counts: Counts, before: Counts, expected: Breach | None) -> None:
    assert judge(section(**limits), WATCH, counts, before) == expected


times = st.lists(st.floats(0, 1000), max_size=40)


def tallied(failed: int, firsts: list[float], totals: list[float], scores: list[float]) -> Counts:
    tally = Tally()
    for _ in range(failed):
        tally.failed()
    for place, total in enumerate(totals):
        tally.answered(firsts[place] if place < len(firsts) else None, total)
    for score in scores:
        tally.checked("json", score)
    return tally.counts()


some_counts = st.builds(tallied, st.integers(0, 40), times, times, st.lists(st.sampled_from([0.0, 0.5, 1.0])))


@settings(max_examples=40, deadline=None)
@given(some_counts, some_counts, some_counts)
def test_counts_add_up_in_any_order(one: Counts, two: Counts, three: Counts) -> None:
    assert one.plus(two) == two.plus(one)
    assert one.plus(two).plus(three) == one.plus(two.plus(three))
    assert one.plus(Counts()) == one


@settings(max_examples=40, deadline=None)
@given(some_counts)
def test_nobody_is_judged_worse_than_itself_nor_by_too_little(counts: Counts) -> None:
    relative = {
        name: {key: value for key, value in limit.items() if "before" in key}
        for name, limit in ALL.items()
        if name != "checkers"
    }
    checkers = {"json": {"check": {"kind": "json"}, "below_before": 0.0}}
    assert judge(section(**relative, checkers=checkers), WATCH, counts, counts) is None
    most = max(counts.requests, counts.checks.get("json", (0, 0.0))[0]) + 1
    assert judge(section(**{**ALL, "min_requests": most}), WATCH, counts, Counts()) is None


@settings(max_examples=40, deadline=None)
@given(some_counts, some_counts, st.integers(1, 40))
def test_one_more_failure_never_saves_a_version(counts: Counts, before: Counts, more: int) -> None:
    guard = section(error_rate=ALL["error_rate"])
    if judge(guard, WATCH, counts, before):
        assert judge(guard, WATCH, counts.plus(Counts(more, more)), before)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=200))
def test_a_p95_is_at_most_a_class_too_high(seconds: list[float]) -> None:
    exact = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    found = p95(tallied(0, [], seconds, []).totals)
    assert found is not None
    assert exact <= found * 1.000001
    assert found <= exact * STEP * 1.000001


def test_times_of_no_length_and_none_at_all() -> None:
    assert p95({}) is None
    assert (class_of(0), class_of(-1), class_of(0.001), class_of(0.00101)) == (0, 0, 0, 1)


def test_a_tally_forgets_what_is_two_windows_old() -> None:
    tally = Tally()
    tally.failed()
    tally.rotate()
    tally.answered(None, 1.0)
    assert (tally.counts().requests, tally.counts().failures) == (2, 1)
    tally.rotate()
    assert (tally.counts().requests, tally.counts().failures) == (1, 0)


@pytest.mark.parametrize(
    ("check", "fault"),
    [
        ({"check": {"kind": "jsn"}, "at_least": 1}, "jsn"),
        ({"check": {"kind": "exact"}, "at_least": 1}, "exact needs a reference"),
        ({"check": {"kind": "instructions"}, "at_least": 1}, "live answers have none"),
        ({"check": {"kind": "bullets"}, "at_least": 1}, "give min, max or both"),
        ({"check": {"kind": "json"}}, "give at_least, below_before or both"),
        ({"check": {"kind": "json"}, "at_most": 1}, "at_most"),
    ],
)
def test_a_checker_that_cannot_be_used_is_refused(check: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        section(checkers={"one": check})


def test_the_guide_shows_a_section_that_is_read() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(guard:.*?)```", guide, re.DOTALL)
    shown = yaml.safe_load(block)["guard"]
    assert shown.keys() == GuardSection.model_fields.keys()
    assert GuardSection.model_validate(shown).active


def test_by_default_nothing_is_watched() -> None:
    assert not ServeConfig(registry="r", base="b").guard.active
    assert section(total_p95_s={"at_most": 1}).active
    assert section(**ALL).active
