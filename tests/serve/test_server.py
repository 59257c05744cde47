from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from serve.config import ServeConfig
from serve.errors import BadRequestError, Failure
from serve.requests import Route
from serve.server import _plain, _relabel, _request, llm_config
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
    assert type(_request(route, body)).__name__ == kind


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
        _request("chat", {**CHAT, **fields})
    assert caught.value.param == param


def test_the_engines_own_id_never_leaves() -> None:
    chunk = 'data: {"id":"1","model":"base:support@v1","choices":[{"text":"\\"model\\":\\"base:support@v1\\""}]}'
    changed = _relabel(chunk, TARGET)
    assert isinstance(changed, str)
    assert changed.startswith('data: {"id":"1","model":"support@v1",')
    assert changed.endswith('"\\"model\\":\\"base:support@v1\\""}]}')
    assert _relabel('{"model":"base"}', Target("base", None)) == '{"model":"base"}'


def test_what_the_engine_says_becomes_plain_data() -> None:
    class Info(BaseModel):
        message: str
        code: int
        param: str | None = None

    class Error(BaseModel):
        error: Info

    assert _plain("data: 1\n\n") == "data: 1\n\n"
    assert _plain(Info(message="m", code=1)) == '{"message":"m","code":1,"param":null}'
    assert _plain(Error(error=Info(message="bad\ntrace", code=400, param="n"))) == Failure(
        400, "bad", "invalid_request_error", "n"
    )
    for failed in (Error(error=Info(message="/secret", code=500)), 'data: {"error": {"message": "/secret"}}\n\n'):
        failure = _plain(failed)
        assert isinstance(failure, Failure)
        assert failure.status == 500
        assert "secret" not in failure.message


def test_a_cpu_config_for_the_engine() -> None:
    made = llm_config(ServeConfig(registry="r", base="/models/base"))
    assert made.accelerator_type is None
    assert made.placement_group_config == {"bundles": [{"CPU": 1.0}]}
    assert made.runtime_env == {"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1"}}
    assert made.engine_kwargs["enable_lora"] is True
    assert made.engine_kwargs["trust_request_chat_template"] is False
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
    assert made.deployment_config["autoscaling_config"]["max_replicas"] == 3
