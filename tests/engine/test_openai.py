"""What OpenAI's API promises, on the real engine: structure, tools, log-probabilities, choices, ids, going away."""

from __future__ import annotations

import json
import re
import time
from typing import Any

import httpx
import pytest

from tests.engine.conftest import BASE, Endpoint
from tests.engine.test_serve import ask, events, refused, text, until

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 9}},
    "required": ["city", "count"],
    "additionalProperties": False,
}


def running(endpoint: Endpoint) -> float:
    metrics = endpoint.client.get("/metrics").text
    found = re.search(r"^raysft_requests_in_flight\S* ([0-9.]+)", metrics, re.MULTILINE)
    assert found
    return float(found[1])


def test_answers_keep_to_a_json_schema(endpoint: Endpoint) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "place", "schema": SCHEMA}}
    answer = json.loads(text(ask(endpoint, BASE, response_format=wanted, max_tokens=60, min_tokens=0)))
    assert set(answer) == {"city", "count"}
    assert isinstance(answer["count"], int)


@pytest.mark.parametrize(
    ("structure", "pattern"),
    [({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"), ({"choice": ["refund", "replace"]}, "refund|replace")],
)
def test_answers_keep_to_a_regex_or_a_choice(endpoint: Endpoint, structure: dict[str, Any], pattern: str) -> None:
    assert re.fullmatch(pattern, text(ask(endpoint, "support@v1", structured_outputs=structure, min_tokens=0)))


def test_log_probabilities(endpoint: Endpoint) -> None:
    choice = ask(endpoint, "support@v1", logprobs=True, top_logprobs=3).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert "".join(bytes(token["bytes"]).decode() for token in told) == choice["message"]["content"]
    for token in told:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] == pytest.approx(max(top["logprob"] for top in token["top_logprobs"]), abs=1e-4)


def test_several_answers_are_counted_together(endpoint: Endpoint) -> None:
    body = ask(endpoint, "support@v1", n=3, temperature=1.0, max_tokens=8, min_tokens=8).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert body["usage"]["completion_tokens"] == 24
    usage = {"include_usage": True}
    streamed = events(
        ask(endpoint, "support@v1", n=2, temperature=1.0, max_tokens=8, stream=True, stream_options=usage)
    )
    assert json.loads(streamed[-2])["usage"]["completion_tokens"] == 16


def test_a_named_tool_is_called_with_arguments_of_its_schema(endpoint: Endpoint) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    choice = {"type": "function", "function": {"name": "weather"}}
    answer = ask(endpoint, BASE, tools=[tool], tool_choice=choice, max_tokens=120, min_tokens=0).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert set(json.loads(call["function"]["arguments"])) == {"city", "count"}


def test_the_request_id_goes_through_and_comes_back_once(endpoint: Endpoint) -> None:
    body = {"model": "support", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    answer = endpoint.client.post("/v1/chat/completions", json=body, headers={"x-request-id": "ticket-7"})
    assert answer.headers.get_list("x-request-id") == ["ticket-7"]
    assert answer.json()["id"] == "chatcmpl-ticket-7"


def test_a_client_that_leaves_stops_its_generation(endpoint: Endpoint) -> None:
    body = {
        "model": "support@v1",
        "messages": [{"role": "user", "content": "Count."}],
        "max_tokens": 400,
        "min_tokens": 400,
        "stream": True,
    }
    with (
        httpx.Client(base_url=endpoint.url, timeout=60) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()  # httpx leaves when the last reference to it is gone
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["choices"][0]["delta"]["role"] == "assistant"
        assert running(endpoint) >= 1
    left = time.monotonic()
    until(lambda: running(endpoint) == 0)
    # Had the engine gone on with 400 tokens, a short answer would wait for its share of the cores.
    assert text(ask(endpoint, "support@v1", max_tokens=2, min_tokens=2))
    assert time.monotonic() - left < 8


def test_a_body_that_is_too_large_is_413_through_the_proxy(endpoint: Endpoint) -> None:
    body = {"model": "support", "messages": [{"role": "user", "content": "x" * (5 << 20)}]}
    assert refused(endpoint.client.post("/v1/chat/completions", json=body), 413)["code"] == "body_too_large"
