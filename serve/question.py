"""A request on its way to an engine, and who asks it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from serve.errors import BadRequestError
from serve.keys import Key
from serve.requests import Route
from serve.traffic import Choice

SESSION_HEADER = "x-raysft-session"
SESSION_CHARS = 256


@dataclass(frozen=True, slots=True)
class Question:
    """A request that was checked and pinned to what answers it."""

    route: Route
    body: dict[str, Any]
    choice: Choice
    key: Key
    prompt_tokens: int
    """About how many tokens the prompt has."""
    answer_tokens: int
    """How many tokens all its answers have at most."""


def session_of(header: str | None, body: dict[str, Any]) -> str | None:
    """What keeps a caller on the same version of an alias: the header if it was sent, else OpenAI's field `user`.

    Args:
        header: the request's `x-raysft-session`.
        body: the request's body.

    Returns:
        The session's name; None where the request says none, so that it is drawn by itself.

    Raises:
        BadRequestError: it is no text, or a long one.
    """
    user = body.get("user")
    if not isinstance(user, str | None):
        raise BadRequestError("user: must be a text", "user")
    for name, session in ((SESSION_HEADER, header), ("user", user)):
        if session is not None and len(session) > SESSION_CHARS:
            field = "user" if name == "user" else None
            raise BadRequestError(
                f"{name}: {len(session):,} characters are above this server's limit of {SESSION_CHARS}", field
            )
    return header or user or None
