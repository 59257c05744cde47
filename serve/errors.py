"""Errors of serving, and the one map from an error's class to an HTTP status and OpenAI's error body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.errors import AdapterError, RaysftError, StorageError


class ServeError(RaysftError):
    """Base of the errors that only serving knows."""


class BadRequestError(ServeError):
    """A request breaks a rule; `param` names the field, where there is one."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnknownModelError(ServeError):
    """A request or a command names a model, version or alias that does not exist."""


class RetiredModelError(UnknownModelError):
    """A request names a version that was retired: it existed, and will not come back."""


class ConflictError(ServeError):
    """Someone else changed the same thing in the meantime."""


class NotReadyError(ServeError):
    """The application cannot answer now, or did not start."""


class RegistryError(StorageError):
    """The registry cannot be read or written."""


class VersionRefusedError(AdapterError):
    """A published version is unfit for this server. The text names no path, so that a client may read it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error as a client sees it; passes between processes as plain data, so that no traceback does."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None

    def body(self) -> dict[str, Any]:
        """The body of the response, in OpenAI's shape."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


@dataclass(frozen=True, slots=True)
class _Rule:
    status: int
    type: str
    code: str | None = None
    param: str | None = None
    message: str | None = None
    """What a client reads instead of the error's own text, which may name a path or an address."""


_RULES: dict[type[Exception], _Rule] = {
    BadRequestError: _Rule(400, "invalid_request_error"),
    UnknownModelError: _Rule(404, "invalid_request_error", "model_not_found", "model"),
    RetiredModelError: _Rule(410, "invalid_request_error", "model_retired", "model"),
    ConflictError: _Rule(409, "conflict_error"),
    VersionRefusedError: _Rule(422, "invalid_request_error", "model_refused", "model"),
    NotReadyError: _Rule(503, "server_error", "not_ready"),
    StorageError: _Rule(503, "server_error", "registry_unavailable", message="the adapter registry cannot be read now"),
}
_INTERNAL = _Rule(500, "server_error", "internal_error", message="internal error; the server's log has the details")


def failure_of(error: Exception) -> Failure:
    """Maps an error to what a client sees. An error that no rule knows becomes a 500 that tells nothing."""
    rule = next((_RULES[kind] for kind in type(error).__mro__ if kind in _RULES), _INTERNAL)
    param = error.param if isinstance(error, BadRequestError) else rule.param
    return Failure(rule.status, rule.message or str(error), rule.type, param, rule.code)
