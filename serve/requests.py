"""The body of a request -> a JSON object that may go to the engine, whose own models check the rest."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from serve.caps import check_caps
from serve.config import CapsSection
from serve.errors import BadRequestError

Route = Literal["chat", "completions", "tokenize"]

ROLES = ("system", "developer", "user", "assistant", "tool")
PARTS = ("text", "refusal")
THINKING = "enable_thinking"
"""The one chat template argument that a client may set."""

BYTES_PER_TOKEN = 4
ASSUMED_ANSWER = 256
"""Tokens that are reserved for an answer of no stated length."""

_TEMPLATE = "the server applies the template that the model was trained with"
_TEXT_ONLY = "this server takes text only"
_ENGINE = "it is the engine's own"

REFUSED_FIELDS: dict[str, tuple[object, str]] = {
    "chat_template": (None, _TEMPLATE),
    "documents": (None, _TEMPLATE),
    "add_generation_prompt": (True, _TEMPLATE),
    "continue_final_message": (False, _TEMPLATE),
    "request_id": (None, "send the header X-Request-ID instead"),
    "priority": (0, "all requests have the same priority"),
    "prompt_embeds": (None, _TEXT_ONLY),
    "media_io_kwargs": (None, _TEXT_ONLY),
    "mm_processor_kwargs": (None, _TEXT_ONLY),
    "kv_transfer_params": (None, _ENGINE),
    "ec_transfer_params": (None, _ENGINE),
    "vllm_xargs": (None, _ENGINE),
}
"""Fields that the engine knows but a client may not set: the one value that changes nothing, and why."""


def read_body(route: Route, data: bytes, caps: CapsSection, max_tokens: int) -> dict[str, Any]:
    """Reads a request's body and checks what must hold before a model is looked up.

    Args:
        route: what is asked for.
        data: the body's bytes.
        caps: how large its parts may be.
        max_tokens: how long an answer it may ask for.

    Raises:
        BadRequestError: names the field and what is allowed there.
    """
    body = read_object(data)
    model = body.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequestError(f"model: must be the id of a model, got {_kind(model)}", "model")
    if not isinstance(body.get("stream"), bool | None):
        raise BadRequestError(f"stream: must be true or false, got {_kind(body['stream'])}", "stream")
    for field, (harmless, why) in REFUSED_FIELDS.items():
        if body.get(field) not in (None, harmless):
            raise BadRequestError(f"{field}: may not be set; {why}", field)
    if route == "chat" or "messages" in body:
        if body.get("add_special_tokens") not in (None, False):
            raise BadRequestError(f"add_special_tokens: may not be set; {_TEMPLATE}", "add_special_tokens")
        _check_template_arguments(body.get("chat_template_kwargs"))
        _check_messages(body.get("messages"))
    check_caps(body, caps, max_tokens)
    return body


def read_object(data: bytes) -> dict[str, Any]:
    """Reads bytes that must be one JSON object; numbers that are not finite are refused, as JSON itself has none.

    Raises:
        BadRequestError: they are something else.
    """
    try:
        body = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:
        raise BadRequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise BadRequestError(f"the body must be a JSON object, got {_kind(body)}")
    return body


def tokens_asked(route: Route, body: dict[str, Any], size: int) -> tuple[int, int]:
    """About how many tokens a request will take, before any tokenizer has seen it.

    Args:
        route: what is asked for.
        body: as `read_body` gave it.
        size: the body's bytes.

    Returns:
        Tokens of the prompt, and of all answers together at their longest.
    """
    prompt = math.ceil(size / BYTES_PER_TOKEN)
    if route == "tokenize":
        return prompt, 0
    longest = body.get("max_completion_tokens")
    if longest is None:
        longest = body.get("max_tokens")
    given = body.get("prompt")
    prompts = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    return prompt, int(ASSUMED_ANSWER if longest is None else longest) * int(body.get("n") or 1) * prompts


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no finite number")
    return value


def _check_template_arguments(arguments: object) -> None:
    if arguments is None:
        return
    where = "chat_template_kwargs"
    if not isinstance(arguments, dict):
        raise BadRequestError(f"{where}: must be an object, got {_kind(arguments)}", where)
    for name, value in arguments.items():
        if name != THINKING:
            raise BadRequestError(f"{where}.{name[:40]}: may not be set; only {THINKING} may, as {_TEMPLATE}", where)
        if not isinstance(value, bool):
            raise BadRequestError(f"{where}.{THINKING}: must be true or false, got {_kind(value)}", where)


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
        content = message.get("content")
        if not isinstance(content, str | list) and not (role == "assistant" and "tool_calls" in message):
            got = _kind(content)
            raise BadRequestError(f"{where}.content: must be a text or a list of parts, got {got}", "messages")
        if isinstance(content, list):
            _check_parts(content, where)


def _check_parts(parts: list[Any], where: str) -> None:
    for index, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in PARTS or not isinstance(part.get(kind), str):
            expected = "an object with type text and a text"
            raise BadRequestError(f"{where}.content[{index}]: must be {expected}; {_TEXT_ONLY}", "messages")


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
