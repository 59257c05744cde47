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


class UnauthorizedError(ServeError):
    """A request carries no API key, or one that is unknown."""


class ForbiddenError(ServeError):
    """The API key is known, but what it asks for is not among what it may do; `param` names the field, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BodyTooLargeError(ServeError):
    """The body of a request has more bytes than the server reads."""


class EndlessBodyError(BodyTooLargeError):
    """A body of no stated length went on for longer than the server reads."""


class MediaTypeError(ServeError):
    """The body of a request is said to be something else than JSON."""


class BodyTimeoutError(ServeError):
    """The client took too long to send a request."""


class ClientGoneError(ServeError):
    """The client went away; nobody reads what would be said to it."""


class AnswerTimeoutError(ServeError):
    """The engine took longer for an answer than the server allows."""


class FullError(ServeError):
    """The server already works on as many requests as it takes."""

    limit = "server"


class LimitError(ServeError):
    """A key has used up one of its limits.

    Args:
        message: what was reached, and when to come back.
        limit: which limit: `requests`, `tokens` or `concurrency`.
        headers: what the client is told beside the message: when to retry, and what is left.
    """

    def __init__(self, message: str, limit: str, headers: tuple[tuple[str, str], ...]) -> None:
        super().__init__(message)
        self.limit, self.headers = limit, headers

    def __reduce__(self) -> tuple[type[LimitError], tuple[str, str, tuple[tuple[str, str], ...]]]:
        return type(self), (str(self), self.limit, self.headers)


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
    headers: tuple[tuple[str, str], ...] = ()

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
    headers: tuple[tuple[str, str], ...] = ()


_SOON = (("retry-after", "1"),)
_NO_RETRY = (("x-should-retry", "false"),)
"""Heeded by OpenAI's clients, which else ask twice more for what would fail twice more."""
_HANG_UP = (("connection", "close"),)
"""The rest of the body may never end. A client that stated a length is let finish, or it would miss the answer."""

_RULES: dict[type[Exception], _Rule] = {
    BadRequestError: _Rule(400, "invalid_request_error"),
    UnauthorizedError: _Rule(
        401, "invalid_request_error", "invalid_api_key", headers=(("www-authenticate", "Bearer"),)
    ),
    ForbiddenError: _Rule(403, "permission_error", "not_allowed"),
    UnknownModelError: _Rule(404, "invalid_request_error", "model_not_found", "model"),
    RetiredModelError: _Rule(410, "invalid_request_error", "model_retired", "model"),
    BodyTimeoutError: _Rule(408, "invalid_request_error", "request_timeout", headers=_HANG_UP),
    ConflictError: _Rule(409, "conflict_error", "conflict", headers=_NO_RETRY),
    BodyTooLargeError: _Rule(413, "invalid_request_error", "body_too_large"),
    EndlessBodyError: _Rule(413, "invalid_request_error", "body_too_large", headers=_HANG_UP),
    MediaTypeError: _Rule(415, "invalid_request_error", "unsupported_media_type"),
    VersionRefusedError: _Rule(422, "invalid_request_error", "model_refused", "model"),
    LimitError: _Rule(429, "rate_limit_error", "rate_limit_exceeded"),
    ClientGoneError: _Rule(499, "invalid_request_error", "client_gone"),
    NotReadyError: _Rule(503, "server_error", "not_ready", headers=_SOON),
    FullError: _Rule(503, "server_error", "server_full", headers=_SOON),
    StorageError: _Rule(
        503, "server_error", "registry_unavailable", None, "the adapter registry cannot be read now", _SOON
    ),
    AnswerTimeoutError: _Rule(504, "server_error", "timeout", headers=_NO_RETRY),
}
_INTERNAL = _Rule(500, "server_error", "internal_error", message="internal error; the server's log has the details")

CODES = frozenset(rule.code for rule in (*_RULES.values(), _INTERNAL) if rule.code)
"""All codes that errors of the classes above have."""


def failure_of(error: Exception) -> Failure:
    """Maps an error to what a client sees. An error that no rule knows becomes a 500 that tells nothing."""
    rule = next((_RULES[kind] for kind in type(error).__mro__ if kind in _RULES), _INTERNAL)
    param = error.param if isinstance(error, BadRequestError | ForbiddenError) else rule.param
    headers = error.headers if isinstance(error, LimitError) else rule.headers
    return Failure(rule.status, rule.message or str(error), rule.type, param, rule.code, headers)
