from __future__ import annotations

import pickle

from sft.messages import Message, Reason, RowError, ToolCall


def test_a_template_sees_no_key_without_a_value() -> None:
    assert Message("user", "Hi", trained=True).to_dict() == {"role": "user", "content": "Hi"}


def test_a_template_sees_tools_as_openai_writes_them() -> None:
    call = ToolCall("add", {"a": 1}, "c1")
    assert Message("assistant", "", reasoning="Add.", tool_calls=(call, ToolCall("stop", {}))).to_dict() == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Add.",
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}},
            {"type": "function", "function": {"name": "stop", "arguments": {}}},
        ],
    }
    assert Message("tool", "1", tool_call_id="c1", name="add").to_dict() == {
        "role": "tool",
        "content": "1",
        "tool_call_id": "c1",
        "name": "add",
    }


def test_an_error_survives_the_way_from_a_worker() -> None:
    error = pickle.loads(pickle.dumps(RowError(Reason.TOO_LONG, "messages", "9 tokens")))
    assert (error.reason, error.field, error.message) == (Reason.TOO_LONG, "messages", "9 tokens")
