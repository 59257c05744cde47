"""The body of a request -> a JSON object that may go to the engine, whose own models check the rest."""

from __future__ import annotations

import json
from typing import Any, Literal

from serve.errors import BadRequestError

Route = Literal["chat", "completions", "tokenize"]

ROLES = ("system", "developer", "user", "assistant", "tool")

REFUSED_FIELDS = {
    "chat_template": "the server applies the template that the model was trained with",
    "request_id": "send the header X-Request-ID instead",
}
"""Fields that the engine knows but a client may not set, and why."""


def read_body(route: Route, data: bytes) -> dict[str, Any]:
    """Reads a request's body and checks what must hold before a model is looked up.

    Raises:
        BadRequestError: names the field and what is allowed there.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {_kind(body)}")
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError(f"model: must be the id of a model, got {_kind(model)}", "model")
    for field, why in REFUSED_FIELDS.items():
        if body.get(field) is not None:
            raise BadRequestError(f"{field}: may not be set; {why}", field)
    keywords = body.get("chat_template_kwargs")
    if isinstance(keywords, dict) and "chat_template" in keywords:
        raise BadRequestError(f"chat_template_kwargs.chat_template: may not be set; {REFUSED_FIELDS['chat_template']}")
    if route == "chat" or "messages" in body:
        _check_messages(body.get("messages"))
    return body


def _check_messages(messages: object) -> None:
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if messages == [] else _kind(messages)
        raise BadRequestError(f"messages: must be a list of at least one message, got {got}", "messages")
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadRequestError(f"{where}: must be an object with role and content, got {_kind(message)}", "messages")
        role = message.get("role")
        if role not in ROLES:
            raise BadRequestError(f"{where}.role: must be one of {', '.join(ROLES)}, got {_shown(role)}", "messages")
        if not isinstance(message.get("content"), str | list) and not (role == "assistant" and "tool_calls" in message):
            got = _kind(message.get("content"))
            raise BadRequestError(f"{where}.content: must be a text or a list of parts, got {got}", "messages")
        _check_parts(message.get("content"), where)


def _check_parts(content: object, where: str) -> None:
    for index, part in enumerate(content if isinstance(content, list) else []):
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or (kind == "text" and not isinstance(part.get("text"), str)):
            expected = "an object with a type, and for the type text with a text"
            raise BadRequestError(f"{where}.content[{index}]: must be {expected}", "messages")


def _kind(value: object) -> str:
    """A JSON value's kind, as a client knows it."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a boolean"
    for kind, name in ((int, "a number"), (float, "a number"), (list, "a list"), (dict, "an object")):
        if isinstance(value, kind):
            return name
    return "an empty text" if value == "" else "a text"


def _shown(value: object, limit: int = 40) -> str:
    return repr(value)[:limit] if isinstance(value, str) else _kind(value)
