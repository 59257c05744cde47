from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ray.serve.llm.deployment import LLMServer

from serve.config import ServeConfig
from serve.errors import BadRequestError, Failure
from serve.items import DONE, EventJoiner, Final, Usage
from serve.loader import Loaded
from serve.requests import Route
from serve.server import EngineServer, _blamed, _items, _names, _relabel, _request, llm_config
from serve.traffic import Target
from serve.versions import VersionId

CHAT = {"model": "base:support@v1", "messages": [{"role": "user", "content": "hi"}]}
TARGET = Target("base", VersionId("support", 1))


@pytest.mark.parametrize(
    ("route", "body", "kind"),
    [
        ("chat", CHAT, "ChatCompletionRequest"),
        ("completions", {"model": "m", "prompt": "x"}, "CompletionRequest"),
        ("tokenize", {"model": "m", "prompt": "x"}, "TokenizeCompletionRequest"),
        ("tokenize", CHAT, "TokenizeChatRequest"),
    ],
)
def test_each_route_has_its_request(route: Route, body: dict[str, Any], kind: str) -> None:
    assert type(_request(route, body, "id")).__name__ == kind


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"temprature": 1}, "^temprature: no such field in this request$", "temprature"),
        ({"temperature": "hot"}, "^temperature: Input should be a valid number", "temperature"),
        ({"n": [1]}, "^n: ", "n"),
        ({"response_format": {"type": "json_schema"}}, "json_schema", "response_format"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, Any], message: str, param: str) -> None:
    with pytest.raises(BadRequestError, match=message) as caught:
        _request("chat", {**CHAT, **fields}, "id")
    assert caught.value.param == param


@pytest.mark.parametrize(("route", "body"), [("chat", CHAT), ("completions", {"model": "m", "prompt": "x"})])
def test_the_engine_works_under_the_gateways_id(route: Route, body: dict[str, Any]) -> None:
    request: Any = _request(route, body, "from-the-client")
    assert request.request_id == "from-the-client"
    assert "request_id" in request.model_fields_set  # else Ray's server puts an id of its own in


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"stream": False}, None),
        ({"stream": True}, (True, False)),
        ({"stream": True, "stream_options": None}, (True, False)),
        ({"stream": True, "stream_options": {}}, (True, False)),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": False, "continuous_usage_stats": True}}, (True, False)),
        ({"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}, (True, True)),
    ],
)
def test_every_stream_tells_its_usage(fields: dict[str, Any], expected: tuple[bool, bool] | None) -> None:
    options = _request("chat", {**CHAT, **fields}, "id").stream_options  # type: ignore[attr-defined]
    assert (options and (options.include_usage, bool(options.continuous_usage_stats))) == expected


def test_stream_options_without_a_stream_are_refused_as_before() -> None:
    with pytest.raises(BadRequestError, match="Stream options can only be defined when"):
        _request("chat", {**CHAT, "stream_options": {"include_usage": True}}, "id")


@pytest.mark.parametrize("route", ["chat", "tokenize"])
def test_a_client_may_not_bring_a_template(route: Route) -> None:
    with pytest.raises(BadRequestError, match=r"^chat_template: may not be set; each version brings its own$"):
        _request(route, {**CHAT, "chat_template": "{{ messages }}"}, "id")


def loaded(template: str | None, stop_ids: tuple[int, ...]) -> Loaded:
    bundle: Any = None
    return Loaded(VersionId("support", 1), Path("folder"), bundle, template, stop_ids)


def test_a_version_brings_its_template_and_stop_ids() -> None:
    made: Any = _request("chat", {**CHAT, "stop_token_ids": [5]}, "id", loaded("{{ own }}", (7,)))
    assert (made.chat_template, made.stop_token_ids) == ("{{ own }}", [5, 7])
    plain: Any = _request("chat", CHAT, "id", loaded(None, ()))
    assert (plain.chat_template, plain.stop_token_ids) == (None, [])
    asked: Any = _request("tokenize", CHAT, "id", loaded("{{ own }}", (7,)))
    assert asked.chat_template == "{{ own }}"
    text: Any = _request("completions", {"model": "m", "prompt": "x"}, "id", loaded("{{ own }}", (7,)))
    assert text.stop_token_ids == []


SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


def test_structured_output_reaches_the_engine() -> None:
    def constraint(**fields: Any) -> Any:
        return _request("chat", {**CHAT, **fields}, "id").extract_structured_outputs()  # type: ignore[attr-defined]

    named = {"type": "json_schema", "json_schema": {"name": "place", "strict": True, "schema": SCHEMA}}
    assert constraint(response_format=named).json in (SCHEMA, json.dumps(SCHEMA))
    assert constraint(response_format={"type": "json_object"}).json_object is True
    assert constraint(structured_outputs={"json": SCHEMA}).json == SCHEMA
    assert constraint(structured_outputs={"regex": "[0-9]{3}"}).regex == "[0-9]{3}"
    assert constraint(structured_outputs={"choice": ["yes", "no"]}).choice == ["yes", "no"]
    for wrong in ({"regex": "a", "choice": ["b"]}, {}):
        with pytest.raises(BadRequestError):
            constraint(structured_outputs=wrong)
    body = {"model": "m", "prompt": "x", "structured_outputs": {"choice": ["yes", "no"]}}
    completion: Any = _request("completions", body, "id")
    assert completion.structured_outputs.choice == ["yes", "no"]


def test_tools_logprobs_and_reasoning_reach_the_engine() -> None:
    request: Any = _request("chat", {**CHAT, "tools": [TOOL]}, "id")
    assert (request.tools[0].function.name, request.tool_choice) == ("weather", "auto")
    chosen = {"type": "function", "function": {"name": "weather"}}
    request = _request("chat", {**CHAT, "tools": [TOOL], "tool_choice": chosen}, "id")
    assert request.tool_choice.function.name == "weather"
    with pytest.raises(BadRequestError, match="tool_choice"):
        _request("chat", {**CHAT, "tools": [TOOL], "tool_choice": "robot"}, "id")
    request = _request("chat", {**CHAT, "logprobs": True, "top_logprobs": 5}, "id")
    assert (request.logprobs, request.top_logprobs) == (True, 5)
    request = _request("chat", {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}, "id")
    assert request.chat_template_kwargs == {"enable_thinking": False}
    assert _request("chat", {**CHAT, "reasoning_effort": "low", "include_reasoning": False}, "id")


def test_the_engines_own_id_never_leaves() -> None:
    chunk = 'data: {"id":"1","model":"base:support@v1","choices":[{"text":"\\"model\\":\\"base:support@v1\\""}]}'
    ours = 'data: {"id":"1","model":"support@v1","choices":[{"text":"\\"model\\":\\"base:support@v1\\""}]}'
    names = _names(TARGET)
    assert _relabel(chunk, names) == ours
    assert _relabel(2 * chunk, names) == 2 * ours
    assert _relabel(Final(chunk, None), names) == Final(ours, None)
    assert _relabel(Failure(400, chunk, "x"), names) == Failure(400, chunk, "x")
    assert _relabel('{"model":"base"}', _names(Target("base", None))) == '{"model":"base"}'


class Counts(BaseModel):
    prompt_tokens: int = 5
    completion_tokens: int | None = 3


class Choice(BaseModel):
    finish_reason: str | None = "stop"


class Whole(BaseModel):
    choices: list[Choice] = [Choice()]
    usage: Counts = Counts()


class Info(BaseModel):
    message: str
    code: int
    param: str | None = None


class Error(BaseModel):
    error: Info


class Tokens(BaseModel):
    count: int


EVENT = 'data: {"choices":[{"finish_reason":"stop"}]}\n\n'
LAST = 'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'


def joiner() -> EventJoiner:
    return EventJoiner(show_usage=False)


def test_what_the_engine_says_becomes_plain_data() -> None:
    assert _items([EVENT, EVENT], joiner(), "id") == [EVENT + EVENT]
    assert _items([EVENT, LAST, DONE], joiner(), "id") == [Final(EVENT + DONE, Usage(5, 3, "stop"))]
    assert _items([LAST], joiner(), "id") == []
    whole = Final(Whole().model_dump_json(), Usage(5, 3, "stop"))
    assert _items([Whole()], joiner(), "id") == [whole]
    assert _items([Tokens(count=4)], joiner(), "id") == [Final('{"count":4}', Usage(4, 0))]
    refused = Error(error=Info(message="bad\ntrace", code=400, param="n"))
    assert _items([refused], joiner(), "id") == [Failure(400, "bad", "invalid_request_error", "n")]


def test_an_error_ends_what_came_with_it_and_tells_nothing() -> None:
    event = 'data: {"error": {"message": "/secret"}}\n\n'
    for failed in (Error(error=Info(message="/secret", code=500)), event):
        text, failure = _items([EVENT, failed, DONE], joiner(), "id")
        assert text == EVENT
        assert isinstance(failure, Failure)
        assert failure.status == 500
        assert "secret" not in failure.message


@pytest.mark.parametrize(("dead", "failed", "status"), [(False, 500, 500), (True, 500, 503), (True, 400, 400)])
def test_a_dead_engine_is_not_the_requests_fault(dead: bool, failed: int, status: int) -> None:
    item = _blamed(Failure(failed, "no", "x"), dead=dead)
    assert isinstance(item, Failure)
    assert (item.status, dict(item.headers).get("retry-after")) == (status, "1" if status == 503 else None)
    assert _blamed("event", dead=dead) == "event"


def test_a_cpu_config_for_the_engine() -> None:
    made = llm_config(ServeConfig(registry="r", base="/models/base"))
    assert made.accelerator_type is None
    assert made.placement_group_config == {"bundles": [{"CPU": 1.0}]}
    assert made.runtime_env == {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    assert made.engine_kwargs["enable_lora"] is True
    assert made.engine_kwargs["max_cpu_loras"] == 32
    assert made.engine_kwargs["worker_extension_cls"] == "serve.cpu_worker.CpuWorker"
    assert "gpu_memory_utilization" not in made.engine_kwargs
    assert made.deployment_config["num_replicas"] == 1
    assert made.deployment_config["max_ongoing_requests"] == 64


def test_a_gpu_config_for_the_engine() -> None:
    made = llm_config(
        ServeConfig.model_validate(
            {
                "registry": "s3://bucket/registry",
                "base": "org/base-7b",
                "engine": {
                    "use_gpu": True,
                    "accelerator_type": "A100",
                    "tensor_parallel_size": 2,
                    "extra": {"seed": 7},
                },
                "scaling": {"max_replicas": 3},
            }
        )
    )
    assert (made.accelerator_type, made.placement_group_config) == ("A100", None)
    assert made.engine_kwargs["tensor_parallel_size"] == 2
    assert made.engine_kwargs["gpu_memory_utilization"] == 0.9
    assert made.engine_kwargs["seed"] == 7
    assert "worker_extension_cls" not in made.engine_kwargs
    assert made.deployment_config["autoscaling_config"]["max_replicas"] == 3


def test_streams_are_gathered_by_us_and_not_by_rays_timer() -> None:
    replaced = getattr(LLMServer, "_batch_output_stream", None)  # Ray calls it under this name
    assert replaced not in (None, EngineServer._batch_output_stream)
