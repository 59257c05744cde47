"""A raw row of any known format -> a conversation, or a reason why not.

Whatever the format, a row's own `system` text opens the conversation, `tools` are its tool definitions, and `task` and
`cluster` say where it belongs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sft.messages import Conversation, Message, Reason, Role, RowError
from sft.pairs import read_pair
from sft.turns import (
    answer,
    arrange,
    ask,
    kind,
    openai_turn,
    read_completion,
    read_prompt,
    read_tools,
    read_turns,
    sharegpt_turn,
    text_value,
)

FormatName = Literal["auto", "alpaca", "dolly", "flan", "sni", "sharegpt", "openai", "prompt_completion", "preference"]

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class RowSpec:
    """How a source's rows are to be read.

    Args:
        format: the rows' format; `auto` looks at each row's own fields.
        columns: pairs of a format's field and the column that holds it; dots lead into nested ones, and numbers into
            lists (`answers.text.0`).
        roles: the roles whose turns are trained where a row itself does not say.
    """

    format: FormatName = "auto"
    columns: tuple[tuple[str, str], ...] = ()
    roles: tuple[Role, ...] = ("assistant",)


def to_conversation(row: object, spec: RowSpec = RowSpec()) -> Conversation:
    """Converts a parsed row.

    Args:
        row: what JSON, CSV or Parquet gave for one row.
        spec: its format, and how its columns are called.

    Raises:
        RowError: the row is not of that format, with reason, field and message.
    """
    if not isinstance(row, dict):
        raise RowError(Reason.NOT_AN_OBJECT, "", f"expected an object with named fields, got {kind(row)}")
    if not spec.columns:
        return _convert(row, detect(row) if spec.format == "auto" else spec.format, spec)
    renamed = _rename(row, spec.columns)
    name = detect(renamed) if spec.format == "auto" else spec.format
    unread = sorted(field for field, _ in spec.columns if field in renamed and field not in known_fields(name))
    if unread:
        raise RowError(
            Reason.UNKNOWN_FORMAT, unread[0], f"mapped by `columns`, but the row's format {name} has no such"
        )
    try:
        return _convert(renamed, name, spec)
    except RowError as error:
        column = dict(spec.columns).get(error.field.partition("[")[0])
        if column is None:
            raise
        raise RowError(error.reason, error.field, f"{error.message} (column {column})") from None


def detect(row: Mapping[str, object]) -> str:
    """Names the format of a row by its fields; where two fit, by those that are not null.

    Raises:
        RowError: no format has these fields.
    """
    for name, (first, second) in _LEADS:
        if row.get(first) is not None and row.get(second) is not None:
            return name
    for name, (first, second) in _LEADS:
        if first in row and second in row:
            return name
    names = sorted(field if len(field) <= 40 else f"{field[:40]}..." for field in row)[:8]
    fields = ", ".join(names).encode("utf-8", "backslashreplace").decode() or "none"
    known = "; ".join(f"{name}: {', '.join(own)}" for name, own in _FIELDS.items())
    raise RowError(
        Reason.UNKNOWN_FORMAT, "", f"fields {fields} fit no known format ({known}); name the columns in `columns`"
    )


@functools.cache
def known_fields(name: str) -> frozenset[str]:
    """The fields that `columns` may map for a format, or for `auto`."""
    own = (field for known, fields in _FIELDS.items() if name in ("auto", known) for field in fields)
    return frozenset({*own, *_COMMON})


def alpaca(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts `{instruction, input?, output}`. A non-empty input follows the instruction after a blank line."""
    if row.get("history"):
        raise RowError(Reason.UNSUPPORTED_CONTENT, "history", "earlier turns are read from `messages` only")
    return _exchange(_instruction(row), "instruction", row.get("output"), "output", roles)


def dolly(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts `{instruction, context?, response, category?}`."""
    return _exchange(_instruction(row), "instruction", row.get("response"), "response", roles)


def flan(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts FLAN v2's `{inputs, targets, task_name?}`."""
    return _exchange(text_value(row.get("inputs"), "inputs"), "inputs", row.get("targets"), "targets", roles)


def sni(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts one instance of Super-NaturalInstructions, `{Definition, input, output}`, where the first of several
    references is the one that is trained.

    The published table form of the same set, `{definition, inputs, targets, task_name}`, is read, too.
    """
    defined, source, target = _SNI_TABLE if "Definition" not in row and "definition" in row else _SNI
    definition, output = row.get(defined), row.get(target)
    if isinstance(definition, list):
        definition = "\n".join(text_value(line, defined) for line in definition)
    if isinstance(output, list):
        if not output:
            raise RowError(Reason.EMPTY_RESPONSE, target, "the list of references is empty")
        output = output[0]
    given = text_value(row.get(source), source)
    prompt = f"{text_value(definition, defined)}\n\n{given}" if given.strip() else text_value(definition, defined)
    return _exchange(prompt, defined, output, target, roles)


def sharegpt(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts `{conversations: [{from, value}, ...]}`."""
    return arrange(read_turns(row.get("conversations"), "conversations", sharegpt_turn, roles), "conversations")


def openai(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts `{messages: [{role, content, ...}, ...], tools?}`."""
    return arrange(read_turns(row.get("messages"), "messages", openai_turn, roles), "messages")


def prompt_completion(row: Row, roles: Collection[Role]) -> tuple[Message, ...]:
    """Converts `{prompt, completion}`, each a text or a list of messages; of the prompt nothing is trained."""
    messages = [*read_prompt(row.get("prompt"), "prompt"), *read_completion(row.get("completion"), "completion", roles)]
    return arrange(messages, "prompt and completion")


_CONVERTERS: dict[str, Callable[[Row, Collection[Role]], tuple[Message, ...]]] = {
    "alpaca": alpaca,
    "dolly": dolly,
    "flan": flan,
    "sni": sni,
    "sharegpt": sharegpt,
    "openai": openai,
    "prompt_completion": prompt_completion,
}
_FIELDS: dict[str, tuple[str, ...]] = {
    "openai": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "input", "output"),
    "prompt_completion": ("prompt", "completion"),
    "dolly": ("instruction", "context", "response", "category"),
    "sni": ("Definition", "input", "output", "Categories"),
    "flan": ("inputs", "targets", "task_name"),
    "preference": ("prompt", "chosen", "rejected"),
}
_LEADS: tuple[tuple[str, tuple[str, str]], ...] = (
    ("openai", ("messages", "messages")),
    ("alpaca", ("instruction", "output")),
    ("prompt_completion", ("prompt", "completion")),
    ("sharegpt", ("conversations", "conversations")),
    ("dolly", ("instruction", "response")),
    ("sni", ("Definition", "output")),
    ("sni", ("definition", "targets")),
    ("flan", ("inputs", "targets")),
    ("preference", ("chosen", "rejected")),
)
"""The fields that give a format away, the most common first. Sets of pairs may hold their chosen answers once more as
`messages`: where pairs are trained, their format is named and not looked for."""
_COMMON = ("system", "tools", "task", "cluster")
_SNI = ("Definition", "input", "output")
_SNI_TABLE = ("definition", "inputs", "targets")
_TASK_FIELDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_FIELDS, ("task",)),
    "dolly": ("task", "category"),
    "flan": ("task", "task_name"),
    "sni": ("task", "task_name"),
}
_CLUSTER_FIELDS: dict[str, tuple[str, ...]] = {**dict.fromkeys(_FIELDS, ("cluster",)), "sni": ("cluster", "Categories")}


def _convert(row: Row, name: str, spec: RowSpec) -> Conversation:
    if name == "preference":
        messages, rejected = read_pair(row, spec.roles)
    else:
        messages, rejected = _CONVERTERS[name](row, spec.roles), ()
    system = row.get("system")
    if system is not None and system != "":
        first = Message("system", text_value(system, "system"), "system" in spec.roles and not rejected)
        if messages[0].role != "system":
            messages, rejected = (first, *messages), (first, *rejected) if rejected else ()
        elif messages[0].content != first.content:
            raise RowError(Reason.ROLE_ORDER, "system", "the messages have another system turn of their own")
    tools = read_tools(row["tools"]) if "tools" in row else ()
    return Conversation(messages, tools, _label(row, _TASK_FIELDS[name]), _label(row, _CLUSTER_FIELDS[name]), rejected)


def _exchange(
    prompt: str, prompt_field: str, response: object, response_field: str, roles: Collection[Role]
) -> tuple[Message, ...]:
    asked = ask(prompt, prompt_field, "user" in roles)
    answered = answer(text_value(response, response_field), response_field, "assistant" in roles)
    return arrange((asked, answered), response_field)


def _instruction(row: Row) -> str:
    """The instruction, and after a blank line what it is about: Alpaca's input or Dolly's context."""
    prompt = text_value(row.get("instruction"), "instruction")
    given, context = row.get("input"), row.get("context")
    field = "input"
    if context is not None and context != "":
        if given is not None and given != "":
            raise RowError(Reason.WRONG_TYPE, "context", "the row has an input, too; map one of them in `columns`")
        given, field = context, "context"
    if given is None or given == "":
        return prompt
    if not prompt or prompt.isspace():
        raise RowError(Reason.EMPTY_PROMPT, "instruction", "the instruction is empty")
    text = text_value(given, field)
    return prompt if text.isspace() else f"{prompt}\n\n{text}"


def _label(row: Row, fields: Sequence[str]) -> str | None:
    """Reads the name of a row's task or cluster from the first field that holds one; of categories the first."""
    for field in fields:
        value = row.get(field)
        if field == "Categories" and isinstance(value, list):
            value = value[0] if value else None
        if value is not None and value != "":
            return text_value(value, field)
    return None


def _rename(row: Row, columns: tuple[tuple[str, str], ...]) -> Row:
    """Gives mapped columns their fields' names; a column that the row does not have is no field of it."""
    moved = {column for _, column in columns}
    renamed = {name: value for name, value in row.items() if name not in moved}
    for field, column in columns:
        value = _lookup(row, column)
        if value is None:
            renamed.pop(field, None)
        else:
            renamed[field] = value
    return renamed


def _lookup(row: Row, column: str) -> object:
    if column in row:
        return row[column]
    value: object = row
    for part in column.split("."):
        if isinstance(value, dict):
            value = value.get(part)
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value
