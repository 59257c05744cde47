"""The one form of a row that the library knows, and the reasons why a row cannot have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, Literal

from sft.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


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
    NOTHING_TRAINED = "nothing_trained"
    UNSUPPORTED_CONTENT = "unsupported_content"
    UNCLOSED_REASONING = "unclosed_reasoning"
    INVALID_TOOLS = "invalid_tools"
    BAD_ARGUMENTS = "bad_arguments"
    UNKNOWN_TOOL_CALL = "unknown_tool_call"
    SPECIAL_TOKEN = "special_token_in_response"
    TEMPLATE_ERROR = "template_error"
    NOT_MASKABLE = "not_maskable"
    TOO_LONG = "too_long"
    NO_TRAINED_TOKEN = "no_trained_token"
    CHOSEN_EQUALS_REJECTED = "chosen_equals_rejected"
    PROMPTS_DIFFER = "prompts_differ"
    DUPLICATE = "duplicate"
    NEAR_DUPLICATE = "near_duplicate"
    CONTRADICTION = "contradiction"
    CONTAMINATED = "contaminated"
    PERSONAL_DATA = "personal_data"
    HELD_OUT = "held_out"
    SET_ASIDE = "set_aside"


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
class ToolCall:
    """A call that the assistant makes. `arguments` is a JSON object, as chat templates take it."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is true where the model shall learn to produce this turn.

    Rule: only an assistant's turn has `reasoning` (what it thinks before it answers, without the template's marks; ""
    where the row says that it does not think) and `tool_calls`; its content may be empty only where it calls tools.
    """

    role: Role
    content: str
    trained: bool = False
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the turn as a chat template takes it: no key without a value, as templates test for presence."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning is not None:
            turn["reasoning_content"] = self.reasoning
        if self.tool_calls:
            turn["tool_calls"] = [
                {
                    **({"id": call.id} if call.id is not None else {}),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        if self.name is not None:
            turn["name"] = self.name
        return turn


@dataclass(frozen=True, slots=True)
class Conversation:
    """A row in the one form that the rest of the library knows.

    Rule: system at most once and first; then the user and the assistant in turn, where the results of tool calls
    follow the turn that made them; at least one turn is trained; the last turn is trained. `tools` are OpenAI tool
    definitions. `task` and `cluster` are the row's own, None where it names none. A pair has the conversation with the
    rejected answer in `rejected`, of the same prompt; it is empty in every other row.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    task: str | None = None
    cluster: str | None = None
    rejected: tuple[Message, ...] = ()

    @property
    def sides(self) -> tuple[Conversation, ...]:
        """A pair as two conversations, the chosen one first; any other row as the one that it is."""
        if not self.rejected:
            return (self,)
        return replace(self, rejected=()), replace(self, messages=self.rejected, rejected=())

    def with_sides(self, sides: Sequence[Conversation]) -> Conversation:
        """The row with other messages, in the order of `sides`."""
        return replace(self, messages=sides[0].messages, rejected=sides[1].messages if self.rejected else ())
