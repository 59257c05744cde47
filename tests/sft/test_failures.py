from __future__ import annotations

import pytest
from ray.train import ControllerError, WorkerGroupError

from sft.errors import DataError, RaysftError, TrainingError
from sft.failures import stop_at_faults, translated, user_fault


def caused(cause: BaseException) -> Exception:
    error = RuntimeError("outer")
    error.__cause__ = cause
    return error


def test_the_users_own_fault_is_found_wherever_it_lies() -> None:
    fault = DataError("no rows")
    assert user_fault([KeyError("x"), caused(caused(fault))]) is fault
    assert user_fault([KeyError("x")]) is None
    assert translated(WorkerGroupError("many words", {0: RuntimeError("x"), 1: caused(fault)}), "run r failed") is fault
    assert translated(ControllerError(caused(fault)), "run r failed") is fault


def test_any_other_failure_is_one_line() -> None:
    found = translated(WorkerGroupError("many words", {1: ValueError("first line\nlast words\n")}), "run r failed")
    assert isinstance(found, TrainingError)
    assert str(found) == "run r failed: last words (ValueError; the worker logs have the whole story)"


def test_no_restart_is_tried_at_a_fault_of_the_users() -> None:
    callback = stop_at_faults()
    callback.after_exception(None, {0: RuntimeError("the node is gone")})
    with pytest.raises(RaysftError, match="no rows"):
        callback.after_exception(None, {0: RuntimeError("x"), 1: caused(DataError("no rows"))})
