"""A raw row of any known format -> a conversation, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from sft.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


class Reason(StrEnum):
    """Why a row was not kept. The codes are stable: dashboards and tests may count on them."""

    INVALID_ENCODING = "invalid_encoding"
    INVALID_JSON = "invalid_json"
    NOT_AN_OBJECT = "not_an_object"
    UNKNOWN_FORMAT = "unknown_format"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    EMPTY_PROMPT = "empty_prompt"
    EMPTY_RESPONSE = "empty_response"
    UNKNOWN_ROLE = "unknown_role"
    ROLE_ORDER = "role_order"
    NO_RESPONSE = "no_response"
    SPECIAL_TOKEN = "special_token_in_response"
    TEMPLATE_ERROR = "template_error"
    NOT_MASKABLE = "not_maskable"
    TOO_LONG = "too_long"
    NO_TRAINED_TOKEN = "no_trained_token"


class RowError(DataError):
    """One row cannot be used. Never carries the row's content."""

    def __init__(self, reason: Reason, field: str, message: str) -> None:
        self.reason = reason
        self.field = field
        self.message = message
        super().__init__(f"{reason} in {field or 'row'}: {message}")

    def __reduce__(self) -> tuple[type[RowError], tuple[Reason, str, str]]:
        return type(self), (self.reason, self.field, self.message)


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is true where the model shall learn to produce this turn."""

    role: Role
    content: str
    trained: bool = False

    def to_dict(self) -> dict[str, str]:
        """Returns the turn as a chat template and an OpenAI endpoint take it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in the one form that the rest of the library knows.

    Rule: system at most once and first, then user and assistant in turn; the last turn is the assistant's; every
    assistant turn is trained and not empty.
    """

    id: str
    source: str
    messages: tuple[Message, ...]


def alpaca(row: Mapping[str, object]) -> tuple[Message, ...]:
    """Converts `{instruction, input?, output}`. A non-empty input follows the instruction after a blank line."""
    instruction = _text(row, "instruction")
    context = _text(row, "input") if row.get("input") is not None else ""
    if not instruction.strip():
        raise RowError(Reason.EMPTY_PROMPT, "instruction", "the instruction is empty")
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return Message("user", prompt), _response(_text(row, "output"), "output")


def openai(row: Mapping[str, object]) -> tuple[Message, ...]:
    """Converts `{messages: [{role, content}, ...]}`."""
    turns = row.get("messages")
    if turns is None:
        raise RowError(Reason.MISSING_FIELD, "messages", "the field is missing or null")
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise RowError(Reason.WRONG_TYPE, "messages", f"expected a list of messages, got {_kind(turns)}")
    messages = tuple(_turn(turn, f"messages[{i}]") for i, turn in enumerate(turns))
    _check_order(messages)
    return messages


FormatName = Literal["auto", "alpaca", "openai"]
_CONVERTERS: dict[str, Callable[[Mapping[str, object]], tuple[Message, ...]]] = {"alpaca": alpaca, "openai": openai}


def to_messages(row: object, format_name: FormatName = "auto") -> tuple[Message, ...]:
    """Converts a parsed row.

    Args:
        row: what JSON or Parquet gave for one row.
        format_name: the row's format; `auto` looks at the row's own fields.

    Raises:
        RowError: the row is not of that format, with reason, field and message.
    """
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, "", f"expected an object with named fields, got {_kind(row)}")
    name = detect(row) if format_name == "auto" else format_name
    return _CONVERTERS[name](row)


def detect(row: Mapping[str, object]) -> str:
    """Names the format of a row by its fields."""
    if "messages" in row:
        return "openai"
    if "instruction" in row and "output" in row:
        return "alpaca"
    fields = ", ".join(sorted(map(str, row))[:8]) or "none"
    raise RowError(
        Reason.UNKNOWN_FORMAT,
        "",
        f"fields {fields} fit no known format (alpaca: instruction, input, output; openai: messages)",
    )


def _turn(turn: object, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(Reason.WRONG_TYPE, where, f"expected an object with role and content, got {_kind(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        got = role if isinstance(role, str) and len(role) <= 20 else _kind(role)
        raise RowError(Reason.UNKNOWN_ROLE, f"{where}.role", f"got {got!r}; allowed: {', '.join(ROLES)}")
    content = _text(turn, "content", where)
    if role == "assistant":
        return _response(content, f"{where}.content")
    return Message("system" if role == "system" else "user", content)


def _check_order(messages: tuple[Message, ...]) -> None:
    body = messages[1:] if messages and messages[0].role == "system" else messages
    offset = len(messages) - len(body)
    for i, message in enumerate(body):
        wanted = "user" if i % 2 == 0 else "assistant"
        if message.role != wanted:
            raise RowError(
                Reason.ROLE_ORDER, f"messages[{i + offset}].role", f"expected {wanted} here, got {message.role}"
            )
    if not body or body[-1].role != "assistant":
        raise RowError(Reason.NO_RESPONSE, "messages", "the last message must be the assistant's")


def _response(text: str, field: str) -> Message:
    if not text.strip():
        raise RowError(Reason.EMPTY_RESPONSE, field, "the response is empty")
    return Message("assistant", text, trained=True)


def _text(row: Mapping[str, object], field: str, where: str = "") -> str:
    value = row.get(field)
    path = f"{where}.{field}" if where else field
    if value is None:
        raise RowError(Reason.MISSING_FIELD, path, "the field is missing or null")
    if not isinstance(value, str):
        raise RowError(Reason.WRONG_TYPE, path, f"expected text, got {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
