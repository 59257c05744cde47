from __future__ import annotations

import pickle

import pytest

from serve.errors import (
    CODES,
    AnswerTimeoutError,
    BadRequestError,
    BodyTimeoutError,
    BodyTooLargeError,
    ConflictError,
    EndlessBodyError,
    Failure,
    ForbiddenError,
    FullError,
    LimitError,
    MediaTypeError,
    NotReadyError,
    RegistryError,
    UnauthorizedError,
    UnknownModelError,
    VersionRefusedError,
    failure_of,
)
from sft.errors import DataError, RaysftError


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (BadRequestError("no"), 400, "invalid_request_error", None),
        (UnauthorizedError("no"), 401, "invalid_request_error", "invalid_api_key"),
        (ForbiddenError("no"), 403, "permission_error", "not_allowed"),
        (UnknownModelError("no"), 404, "invalid_request_error", "model_not_found"),
        (BodyTimeoutError("no"), 408, "invalid_request_error", "request_timeout"),
        (ConflictError("no"), 409, "conflict_error", "conflict"),
        (BodyTooLargeError("no"), 413, "invalid_request_error", "body_too_large"),
        (MediaTypeError("no"), 415, "invalid_request_error", "unsupported_media_type"),
        (VersionRefusedError("no"), 422, "invalid_request_error", "model_refused"),
        (LimitError("no", "tokens", ()), 429, "rate_limit_error", "rate_limit_exceeded"),
        (NotReadyError("no"), 503, "server_error", "not_ready"),
        (FullError("no"), 503, "server_error", "server_full"),
        (AnswerTimeoutError("no"), 504, "server_error", "timeout"),
    ],
)
def test_each_class_has_its_status_and_keeps_its_text(
    error: RaysftError, status: int, kind: str, code: str | None
) -> None:
    failure = failure_of(error)
    assert (failure.status, failure.type, failure.code, failure.message) == (status, kind, code, "no")
    assert code is None or code in CODES


def test_a_client_is_told_when_to_come_back() -> None:
    assert failure_of(FullError("no")).headers == (("retry-after", "1"),)
    assert failure_of(RegistryError("no")).headers == (("retry-after", "1"),)
    assert failure_of(LimitError("no", "tokens", (("retry-after", "7"),))).headers == (("retry-after", "7"),)
    assert failure_of(AnswerTimeoutError("no")).headers == (("x-should-retry", "false"),)
    assert failure_of(EndlessBodyError("no")).headers == (("connection", "close"),)
    assert failure_of(UnauthorizedError("no")).headers == (("www-authenticate", "Bearer"),)


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
    limit = pickle.loads(pickle.dumps(LimitError("no", "tokens", (("a", "b"),))))
    assert (str(limit), limit.limit, limit.headers) == ("no", "tokens", (("a", "b"),))
    failure = Failure(418, "short", "teapot")
    assert pickle.loads(pickle.dumps(failure)) == failure
