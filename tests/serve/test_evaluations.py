from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve.errors import BadRequestError, ConflictError, RegistryError, UnknownModelError
from serve.evaluations import Findings
from serve.registry import Registry
from serve.versions import VersionId

V1, V2, V9 = (VersionId("support", number) for number in (1, 2, 9))
SCORE = {"asked": 4, "scored": 4, "rows": 4, "mean": 0.75, "interval": (0.25, 1.0)}


def findings(*, passed: bool = True, **changes: Any) -> Findings:
    suite = {"fingerprint": "a" * 64, "version": SCORE, "baseline": SCORE, "difference": 0.0, "interval": (-0.5, 0.5)}
    rule = {"rule": "yes score.mean at_least 0.7", "passed": passed, "reason": "score.mean is 0.75", "rows": ("r3",)}
    whole = {"gate": "b" * 64, "baseline": "support@v1", "suites": {"yes": suite}, "rules": (rule,), "passed": passed}
    return Findings.model_validate({**whole, **changes})


def test_evaluations_are_numbered_beside_the_version_and_change_nothing_of_it(registry: Registry) -> None:
    before = registry.contents(), registry.get(V2)
    first = registry.add_evaluation(V2, findings(), by="key boss", reason="nightly")
    registry.add_evaluation(V2, findings(passed=False), by="key boss")
    again = Registry.open(registry.address)
    assert (again.contents(), again.verify(V2)) == before
    assert again.unfinished(timedelta(0)) == []
    assert [(one.number, one.version, one.by, one.passed) for one in again.evaluations(V2)] == [
        (1, V2, "key boss", True),
        (2, V2, "key boss", False),
    ]
    assert again.evaluation(V2, 1) == first
    assert (first.reason, first.suites["yes"].version.mean, first.rules[0].rows) == ("nightly", 0.75, ("r3",))
    assert again.evaluations(V1) == []
    folder = Path(registry.address) / "versions/support/v2/evaluations"
    assert sorted(path.name for path in folder.iterdir()) == ["0001.json", "0002.json"]


def test_the_next_version_still_gets_the_next_number(registry: Registry, tmp_path: Path) -> None:
    registry.add_evaluation(V2, findings())
    assert registry.publish(tmp_path / "bundle", "support").id == VersionId("support", 3)


def test_an_evaluation_needs_its_version(registry: Registry) -> None:
    with pytest.raises(UnknownModelError, match="there is no version support@v9"):
        registry.add_evaluation(V9, findings())
    with pytest.raises(UnknownModelError, match="support@v1 has no evaluation 1"):
        registry.evaluation(V1, 1)
    assert not (Path(registry.address) / "versions/support/v9").exists()


def test_many_at_once_get_numbers_of_their_own(registry: Registry) -> None:
    def add(_: int) -> int:
        return Registry.open(registry.address).add_evaluation(V1, findings()).number

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(add, range(16))) == list(range(1, 17))


def test_a_record_in_the_wrong_place_is_refused(registry: Registry) -> None:
    registry.add_evaluation(V1, findings())
    folder = Path(registry.address) / "versions/support"
    (folder / "v2/evaluations").mkdir()
    (folder / "v1/evaluations/0001.json").rename(folder / "v2/evaluations/0001.json")
    with pytest.raises(RegistryError, match="is evaluation 1 of support@v1"):
        Registry.open(registry.address).evaluations(V2)


def test_findings_that_contradict_themselves_are_refused() -> None:
    failed = ({"rule": "r", "passed": False, "reason": "is 0"},)
    faults: list[dict[str, Any]] = [{"rules": failed}, {"rules": ()}, {"suites": {}}, {"gate": "x"}, {"more": 1}]
    for changes in faults:
        with pytest.raises(ValidationError):
            findings(**changes)


def test_a_promotion_names_the_evaluation_that_let_it_pass(registry: Registry) -> None:
    passed, failed = (registry.add_evaluation(V2, findings(passed=good)).number for good in (True, False))
    with pytest.raises(BadRequestError, match="support@v2 did not pass its evaluation 2"):
        registry.promote("support", V2, evaluation=failed)
    with pytest.raises(UnknownModelError, match="support@v2 has no evaluation 7"):
        registry.promote("support", V2, evaluation=7)
    assert registry.promote("support", V2, evaluation=passed).evaluation == 1
    assert [entry.evaluation for entry in Registry.open(registry.address).history("support")] == [None, 1]


def test_a_move_from_another_entry_than_expected_changes_nothing(registry: Registry) -> None:
    registry.promote("support", V2, expected=1)
    expected = "support was moved meanwhile: it is at entry 2, no longer at 1; nothing was changed"
    with pytest.raises(ConflictError, match=expected):
        registry.promote("support", V1, expected=1)
    with pytest.raises(ConflictError, match=expected):
        registry.rollback("support", expected=1)
    with pytest.raises(ConflictError, match=expected):
        registry.canary("support", V1, 0.5, expected=1)
    with pytest.raises(ConflictError, match="it is at entry 0, no longer at 3"):
        registry.promote("new", V1, expected=3)
    assert registry.promote("new", V1, expected=0).number == 1
    assert registry.alias("support") == registry.promote("support", V2)


def test_a_rollback_can_leave_a_version_out_of_the_trials(registry: Registry) -> None:
    registry.canary("support", V2, 0.5)
    registry.promote("support", V2)
    back = registry.rollback("support", banned=V2)
    assert (back.version, back.canary, back.action, back.back_to) == (V1, None, "rollback", 1)
    registry.shadow("support", V2, 0.5)
    registry.canary("support", V2, 0.5)
    again = registry.rollback("support", banned=V2)
    assert (again.canary, again.shadow) == (None, None)
    registry.canary("support", V2, 0.5)
    registry.promote("support", V2)
    assert registry.rollback("support").canary is not None
