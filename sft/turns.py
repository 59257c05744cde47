"""A turn as data sets write it -> a Message, and the order that turns must have.

Errors name the field below the turn; `read_turns` puts the turn's own place in front.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from sft.messages import Message, Reason, Role, RowError, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "developer": "system",
    "function": "tool",
}
_FROM: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
_OPEN, _CLOSE = "<think>", "</think>"
_HALF_PAIR = "half of a surrogate pair cannot be written as UTF-8"
_PART_SEPARATOR = "\n"
"""What vLLM puts between text parts for a template that takes plain text, so that both sides agree."""

TurnReader = Callable[[dict[str, Any], Collection[Role]], Message]


def read_turns(value: object, field: str, reader: TurnReader, roles: Collection[Role]) -> list[Message]:
    """Reads a list of turns, or its JSON text.

    Args:
        value: what the row holds.
        field: what it is called in errors.
        reader: `openai_turn` or `sharegpt_turn`.
        roles: the roles whose turns are trained where the turn itself does not say.

    Raises:
        RowError: with the turn's place, such as `messages[2].content`.
    """
    turns = parse_json(value)
    if turns is None:
        raise RowError(Reason.MISSING_FIELD, field, "the field is missing or null")
    if not isinstance(turns, list):
        raise RowError(Reason.WRONG_TYPE, field, f"expected a list of messages, got {kind(value)}")
    messages: list[Message] = []
    for turn in turns:
        try:
            if not isinstance(turn, dict):
                raise RowError(Reason.WRONG_TYPE, "", f"expected an object for each message, got {kind(turn)}")
            messages.append(reader(turn, roles))
        except RowError as error:
            where = f"{field}[{len(messages)}]"
            raise RowError(error.reason, f"{where}.{error.field}" if error.field else where, error.message) from None
    return messages


def openai_turn(turn: dict[str, Any], roles: Collection[Role]) -> Message:
    """Reads `{role, content, reasoning_content?, tool_calls?, tool_call_id?, name?, train? or weight?}`."""
    role = _role(turn.get("role"), _ROLES, "role")
    content = turn.get("content")
    plain = len(turn) == 2 and content is not None  # nothing but role and content, as most turns are
    trained = role in roles if plain else _trained(turn, role in roles)
    if role == "assistant":
        if plain:
            return answer(content_text(content, "content"), "content", trained)
        calls = _tool_calls(turn)
        if content is None and calls:
            content = ""
        reasoning = turn.get("reasoning_content") or turn.get("reasoning")
        message = answer(content_text(content, "content"), "content", trained, calls, reasoning)
        return _named(message, turn.get("name"), None)
    text = content_text(content, "content")
    if role == "user":
        _check_prompt(text, "content")
    if plain:
        return Message(role, text, trained)
    return _named(Message(role, text, trained), turn.get("name"), turn.get("tool_call_id") if role == "tool" else None)


def sharegpt_turn(turn: dict[str, Any], roles: Collection[Role]) -> Message:
    """Reads `{from, value, train? or weight?}`; a turn without `from` is read as OpenAI's."""
    if "from" not in turn:
        return openai_turn(turn, roles)
    speaker = turn["from"]
    role = _role(speaker, _FROM, "from")
    trained = _trained(turn, role in roles)
    value = turn.get("value")
    if speaker == "function_call":
        called = parse_json(value)
        calls = called if isinstance(called, list) else [called]
        if not calls:
            raise RowError(Reason.BAD_ARGUMENTS, "value", "expected a tool call, got an empty list")
        return Message(role, "", trained, tool_calls=tuple(_tool_call(call, "value") for call in calls))
    text = content_text(value, "value")
    if role == "assistant":
        return answer(text, "value", trained)
    if role == "user":
        _check_prompt(text, "value")
    return Message(role, text, trained)


def read_prompt(value: object, field: str) -> list[Message]:
    """Reads a prompt, a text or a list of messages; nothing of it is trained.

    Raises:
        RowError: it is missing, empty or something else.
    """
    if isinstance(value, list):
        return read_turns(value, field, openai_turn, ())
    return [ask(text_value(value, field), field, False)]


def read_completion(value: object, field: str, roles: Collection[Role]) -> list[Message]:
    """Reads what answers a prompt, a text or a list of messages.

    Raises:
        RowError: it is missing, empty or something else.
    """
    if isinstance(value, list):
        return read_turns(value, field, openai_turn, roles)
    return [answer(text_value(value, field), field, "assistant" in roles)]


def ask(text: str, field: str, trained: bool) -> Message:
    """Makes the user's turn of a single exchange.

    Raises:
        RowError: the text is empty.
    """
    _check_prompt(text, field)
    return Message("user", text, trained)


def answer(text: str, field: str, trained: bool, calls: tuple[ToolCall, ...] = (), reasoning: object = None) -> Message:
    """Makes an assistant's turn; reasoning in `<think>` at the beginning of the text is taken apart from it.

    Raises:
        RowError: it says nothing and calls nothing, or its reasoning does not end or stands there twice.
    """
    thought = None if reasoning is None or reasoning == "" else text_value(reasoning, "reasoning_content")
    if _OPEN in text and text.lstrip().startswith(_OPEN):
        if thought is not None:
            raise RowError(Reason.WRONG_TYPE, field, f"reasoning stands both in {_OPEN} and in a field of its own")
        opened, closed, rest = text.lstrip()[len(_OPEN) :].partition(_CLOSE)
        if not closed:
            raise RowError(Reason.UNCLOSED_REASONING, field, f"{_OPEN} is never closed by {_CLOSE}")
        thought, text = "" if opened.isspace() else opened.strip("\n"), rest.lstrip("\n")
    if not calls and (not text or text.isspace()):
        raise RowError(Reason.EMPTY_RESPONSE, field, "the response is empty")
    if thought is None and not calls:
        return Message("assistant", text, trained)
    return Message("assistant", text, trained, thought, calls)


def arrange(messages: Sequence[Message], field: str) -> tuple[Message, ...]:
    """Checks the order of a conversation and cuts it after its last trained turn, as what follows teaches nothing.

    Raises:
        RowError: the order is not that of a Conversation, or no turn is trained.
    """
    if len(messages) == 2 and messages[0].role == "user" and messages[1].role == "assistant" and messages[1].trained:
        return messages[0], messages[1]
    wanted: Role = "user"
    calls: tuple[ToolCall, ...] = ()
    last = -1
    for i, message in enumerate(messages):
        role = message.role
        if role == "tool" and calls:
            _check_result(message, calls, f"{field}[{i}]")
            wanted = "assistant"
        elif role == wanted:
            calls = message.tool_calls
            wanted = "user" if role == "assistant" and not calls else "tool" if calls else "assistant"
        elif role != "system" or i > 0:
            expected = "the result of a tool call" if wanted == "tool" else wanted
            raise RowError(Reason.ROLE_ORDER, f"{field}[{i}]", f"expected {expected} here, got {role}")
        if message.trained:
            last = i
    if not messages or messages[-1].role != "assistant":
        raise RowError(Reason.NO_RESPONSE, field, "the last message must be the assistant's")
    if last < 0:
        raise RowError(Reason.NOTHING_TRAINED, field, "no message is trained, by its own flag or by its role")
    return tuple(messages[: last + 1])


def read_tools(value: object) -> tuple[Mapping[str, Any], ...]:
    """Reads OpenAI tool definitions, or their JSON text; a bare function definition is put in its envelope.

    Raises:
        RowError: they are not a list of named functions.
    """
    if value is None or value == "":
        return ()
    tools = parse_json(value)
    if not isinstance(tools, list):
        raise RowError(Reason.INVALID_TOOLS, "tools", f"expected a list of tool definitions, got {kind(value)}")
    definitions: list[Mapping[str, Any]] = []
    for i, tool in enumerate(tools):
        bare = isinstance(tool, dict) and "function" not in tool
        definition = {"type": "function", "function": tool} if bare else tool
        function = definition.get("function") if isinstance(definition, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(Reason.INVALID_TOOLS, f"tools[{i}]", "expected a function definition with a name")
        definitions.append(definition)
    _check_nested(definitions, "tools", Reason.INVALID_TOOLS)
    return tuple(definitions)


def content_text(value: object, field: str) -> str:
    """Reads text, or the text parts of a list joined by line breaks.

    Raises:
        RowError: there is none, or a part is no text.
    """
    if isinstance(value, str) and value.isascii():
        return value
    if not isinstance(value, list):
        return text_value(value, field)
    parts: list[str] = []
    for i, part in enumerate(value):
        where = f"{field}[{i}]"
        if isinstance(part, dict):
            if part.get("type", "text") != "text":
                raise RowError(
                    Reason.UNSUPPORTED_CONTENT, where, f"part of type {_shown(part['type'])}; only text can be trained"
                )
            parts.append(text_value(part.get("text"), f"{where}.text"))
        else:
            parts.append(text_value(part, where))
    return _PART_SEPARATOR.join(parts)


def text_value(value: object, field: str) -> str:
    """Takes a value as text.

    Raises:
        RowError: it is missing, something else, or cannot be written as UTF-8.
    """
    if not isinstance(value, str):
        if value is None:
            raise RowError(Reason.MISSING_FIELD, field, "the field is missing or null")
        raise RowError(Reason.WRONG_TYPE, field, f"expected text, got {kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RowError(
                Reason.INVALID_ENCODING, field, "half of a surrogate pair cannot be written as UTF-8"
            ) from None
    return value


def parse_json(value: object) -> object:
    """Parses what may be JSON text inside a row; gives the value itself back where it is not."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def kind(value: object) -> str:
    """Names the type of a JSON value for an error message, without the value."""
    names = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", bool: "true or false"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _shown(name: object) -> str:
    return repr(name) if isinstance(name, str) and len(name) <= 20 else kind(name)


def _role(name: object, known: Mapping[str, Role], field: str) -> Role:
    role = known.get(name) if isinstance(name, str) else None
    if role is None:
        if name is None:
            raise RowError(Reason.MISSING_FIELD, field, "the field is missing or null")
        raise RowError(Reason.UNKNOWN_ROLE, field, f"got {_shown(name)}; allowed: {', '.join(known)}")
    return role


def _trained(turn: Mapping[str, object], default: bool) -> bool:
    """A turn's own `train` flag or OpenAI's `weight`, else the default of its role."""
    flag = turn.get("train")
    if flag is not None:
        if not isinstance(flag, bool):
            raise RowError(Reason.WRONG_TYPE, "train", f"expected true or false, got {kind(flag)}")
        return flag
    weight = turn.get("weight")
    if weight is None:
        return default
    if not isinstance(weight, int | float) or weight not in (0, 1):
        raise RowError(Reason.WRONG_TYPE, "weight", "expected 0 or 1")
    return bool(weight)


def _named(message: Message, name: object, call_id: object) -> Message:
    if name is None and call_id is None:
        return message
    return Message(
        message.role,
        message.content,
        message.trained,
        message.reasoning,
        message.tool_calls,
        None if call_id is None else text_value(call_id, "tool_call_id"),
        None if name is None else text_value(name, "name"),
    )


def _check_prompt(text: str, field: str) -> None:
    if not text or text.isspace():
        raise RowError(Reason.EMPTY_PROMPT, field, "the prompt is empty")


def _tool_calls(turn: Mapping[str, object]) -> tuple[ToolCall, ...]:
    value = turn.get("tool_calls")
    if value is None:
        single = turn.get("function_call")
        return () if single is None else (_tool_call(single, "function_call"),)
    calls = parse_json(value)
    if not isinstance(calls, list):
        raise RowError(Reason.WRONG_TYPE, "tool_calls", f"expected a list of tool calls, got {kind(value)}")
    return tuple(_tool_call(call, f"tool_calls[{i}]") for i, call in enumerate(calls))


def _tool_call(call: object, field: str) -> ToolCall:
    """Reads `{id?, function: {name, arguments}}` or `{name, arguments}`; arguments are an object or its JSON text."""
    if not isinstance(call, dict):
        raise RowError(Reason.BAD_ARGUMENTS, field, f"expected a tool call with name and arguments, got {kind(call)}")
    if "function" in call:
        function, where = call["function"], f"{field}.function"
        if not isinstance(function, dict):
            raise RowError(Reason.WRONG_TYPE, where, f"expected an object, got {kind(function)}")
    else:
        function, where = call, field
    name = text_value(function.get("name"), f"{where}.name")
    value = function.get("arguments")
    arguments = {} if value is None or value == "" else parse_json(value)
    if not isinstance(arguments, dict):
        raise RowError(Reason.BAD_ARGUMENTS, f"{where}.arguments", "expected a JSON object, or the text of one")
    _check_nested(arguments, f"{where}.arguments", Reason.BAD_ARGUMENTS)
    call_id = call.get("id")
    return ToolCall(name, arguments, None if call_id is None else text_value(call_id, f"{field}.id"))


def _check_nested(value: object, field: str, reason: Reason) -> None:
    """Makes sure that a template can write a value as JSON."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(Reason.INVALID_ENCODING, field, _HALF_PAIR) from None
    except (RecursionError, ValueError):
        raise RowError(reason, field, "nested too deeply to be written as JSON") from None


def _check_result(message: Message, calls: tuple[ToolCall, ...], field: str) -> None:
    """A result with an id must name one of the calls; one without is taken to answer them."""
    if message.tool_call_id is not None and message.tool_call_id not in {call.id for call in calls}:
        raise RowError(Reason.UNKNOWN_TOOL_CALL, f"{field}.tool_call_id", "no tool call of the turn before has this id")
