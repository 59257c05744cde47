"""How large the parts of a request may be, so that one request cannot take an engine from all others. Pure."""

from __future__ import annotations

import json
from typing import Any

from serve.config import CapsSection
from serve.errors import BadRequestError

LISTS = ("stop_token_ids", "allowed_token_ids", "logprob_token_ids", "bad_words")
ENVELOPE = 3
"""Levels around a schema: `tools`, an entry's `function`, its `parameters`."""


def check_caps(body: dict[str, Any], caps: CapsSection, max_tokens: int) -> None:
    """Checks the counts and sizes in a request; whether the values themselves make sense is the engine's to say.

    Raises:
        BadRequestError: names the field, what was got and what is allowed.
    """
    for field, value in body.items():
        if _too_deep(value, caps.schema_depth + ENVELOPE):
            raise BadRequestError(f"{field[:40]}: is nested deeper than {caps.schema_depth} levels", field[:40])
    for field in ("max_tokens", "max_completion_tokens"):
        _check_number(body, field, 0, max_tokens)
    _check_number(body, "n", 1, caps.n)
    _check_count(body, "messages", caps.messages, "messages")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        _check_count(body, "prompt", caps.prompts, "prompts")
    _check_stop(body.get("stop"), caps)
    for field in ("logit_bias", *LISTS):
        _check_count(body, field, caps.logit_bias, "entries")
    _check_schemas(body, caps)


def _check_number(body: dict[str, Any], field: str, least: int, most: int) -> None:
    """The engine takes the text "5" for a number, too: what is capped must be one already."""
    value = body.get(field)
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise BadRequestError(f"{field}: must be a whole number from {least} to {most:,}", field)
    if value > most:
        raise BadRequestError(f"{field}: {_short(value)} is above this server's limit of {most:,}", field)


def _check_count(body: dict[str, Any], field: str, most: int, what: str) -> None:
    value = body.get(field)
    if isinstance(value, list | dict) and len(value) > most:
        raise BadRequestError(f"{field}: {len(value):,} {what} are above this server's limit of {most:,}", field)


def _check_stop(stop: object, caps: CapsSection) -> None:
    texts = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    if len(texts) > caps.stop:
        raise BadRequestError(f"stop: {len(texts):,} texts are above this server's limit of {caps.stop}", "stop")
    longest = max((len(text) for text in texts if isinstance(text, str)), default=0)
    if longest > caps.stop_chars:
        raise BadRequestError(
            f"stop: a text of {longest:,} characters is above this server's limit of {caps.stop_chars:,}", "stop"
        )


def _check_schemas(body: dict[str, Any], caps: CapsSection) -> None:
    for field in ("response_format", "structured_outputs"):
        _check_size(body.get(field), field, caps)
    structured = body.get("structured_outputs")
    if isinstance(structured, dict) and isinstance(structured.get("json"), str):
        try:
            schema = json.loads(structured["json"])
        except (ValueError, RecursionError):
            raise BadRequestError("structured_outputs.json: is not JSON", "structured_outputs") from None
        if _too_deep(schema, caps.schema_depth):
            raise BadRequestError(
                f"structured_outputs.json: is nested deeper than {caps.schema_depth} levels", "structured_outputs"
            )
    tools = body.get("tools")
    if isinstance(tools, list):
        _check_count(body, "tools", caps.tools, "tools")
        for index, tool in enumerate(tools):
            _check_size(tool, f"tools[{index}]", caps)
        if body.get("tool_choice") not in (None, "none", "auto"):
            _check_size(tools, "tools", caps)  # a forced choice makes the engine compile one grammar of them all


def _check_size(value: object, where: str, caps: CapsSection) -> None:
    if value is None:
        return
    size = len(json.dumps(value, ensure_ascii=False, separators=(",", ":")))
    if size > caps.schema_chars:
        raise BadRequestError(
            f"{where}: {size:,} characters are above this server's limit of {caps.schema_chars:,}",
            where.partition("[")[0],
        )


def _too_deep(value: object, levels: int) -> bool:
    """Whether lists and objects are nested in more than that many levels; goes level by level, without recursion."""
    layer = [value] if isinstance(value, list | dict) else []
    for _ in range(levels):
        if not layer:
            return False
        layer = [
            inner
            for outer in layer
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, list | dict)
        ]
    return bool(layer)


def _short(value: int) -> str:
    return f"{value:,}" if abs(value) < 10**12 else "a number of more than 12 digits"
