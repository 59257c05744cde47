"""A raw row of any known format -> a conversation, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sft.messages import ROLES, Conversation, Message, Reason, Role, RowError

FormatName = Literal["auto", "alpaca", "openai"]


@dataclass(frozen=True, slots=True)
class RowSpec:
    """How a source's rows are to be read.

    Args:
        format: the rows' format; `auto` looks at each row's own fields.
        columns: pairs of a format's field and the column (dotted for nested ones) that holds it.
        roles: the roles whose turns are trained where a row itself does not say.
    """

    format: FormatName = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[Role, ...] = ("assistant",)


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


_CONVERTERS: dict[str, Callable[[Mapping[str, object]], tuple[Message, ...]]] = {"alpaca": alpaca, "openai": openai}


def to_conversation(row: object, spec: RowSpec = RowSpec()) -> Conversation:
    """Converts a parsed row.

    Args:
        row: what JSON, CSV or Parquet gave for one row.
        spec: its format, and how its columns are called.

    Raises:
        RowError: the row is not of that format, with reason, field and message.
    """
    if not isinstance(row, Mapping):
        raise RowError(Reason.NOT_AN_OBJECT, "", f"expected an object with named fields, got {_kind(row)}")
    name = detect(row) if spec.format == "auto" else spec.format
    return Conversation(_CONVERTERS[name](row))


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
