from __future__ import annotations

import pickle

import pytest

from serve.errors import (
    BadRequestError,
    ConflictError,
    Failure,
    NotReadyError,
    RegistryError,
    UnknownModelError,
    VersionRefusedError,
    failure_of,
)
from sft.errors import DataError, RaysftError


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (BadRequestError("no"), 400, "invalid_request_error", None),
        (UnknownModelError("no"), 404, "invalid_request_error", "model_not_found"),
        (ConflictError("no"), 409, "conflict_error", None),
        (VersionRefusedError("no"), 422, "invalid_request_error", "model_refused"),
        (NotReadyError("no"), 503, "server_error", "not_ready"),
    ],
)
def test_each_class_has_its_status_and_keeps_its_text(
    error: RaysftError, status: int, kind: str, code: str | None
) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.type, failure.code, failure.message) == (status, kind, code, "no")


def test_what_may_name_a_path_is_not_told() -> None:
    failure = failure_of(RegistryError("registry /secret/place cannot be read"))
    assert (failure.status, failure.message) == (503, "the adapter registry cannot be read now")


@pytest.mark.parametrize("error", [KeyError("/secret"), RuntimeError("/secret"), DataError("/secret")])
def test_anything_else_is_a_silent_500(error: Exception) -> None:
    failure = failure_of(error)
    assert failure.status == 500
    assert "secret" not in str(failure.body())


def test_a_bad_field_is_named() -> None:
    assert failure_of(BadRequestError("n: must be positive", "n")).body() == {
        "error": {"message": "n: must be positive", "type": "invalid_request_error", "param": "n", "code": None}
    }


def test_errors_and_failures_pass_between_processes() -> None:
    error = pickle.loads(pickle.dumps(BadRequestError("no", "n")))
    assert (str(error), error.param) == ("no", "n")
    failure = Failure(418, "short", "teapot")
    assert pickle.loads(pickle.dumps(failure)) == failure
