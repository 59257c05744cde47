"""The vLLM deployment: Ray's LLMServer with our loader, answering in plain data.

This is the only file that knows the engine. A gateway sends a JSON object and an exact version; it gets JSON text, or
server-sent events as text, or a `Failure`: never an object of vLLM's and never a traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.exceptions import VLLMClientError

from serve.config import ServeConfig
from serve.errors import BadRequestError, Failure, VersionRefusedError, failure_of
from serve.loader import AdapterLoader
from serve.requests import Route
from serve.traffic import Target
from sft.errors import RaysftError
from sft.hardware import cpu_has_bfloat16

DEPLOYMENT = "engine"
DOWNLOAD_TIMEOUT_S = 300.0
KNOWN_VERSIONS = 100_000
"""How many versions a replica remembers the folders of. The engine itself swaps weights in and out of its few slots;
forgetting a folder would free nothing and only cause it to be verified again."""

logger = logging.getLogger("ray.serve")


class EngineServer(LLMServer):
    """One replica: a vLLM engine and the versions that it has loaded."""

    async def __init__(self, llm_config: LLMConfig, *, model_downloader: Any) -> None:  # type: ignore[misc]  # as Ray has it
        self._admission: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        await super().__init__(llm_config, model_downloader=model_downloader)
        # Ray 2.60 looks for the tokenizer routes under the name that they had before vLLM 0.29.
        engine: Any = self.engine
        if engine._oai_serving_tokenization is None:
            engine._oai_serving_tokenization = engine._app_state.serving_tokenization

    async def answer(self, route: Route, body: dict[str, Any], target: Target) -> AsyncIterator[str | Failure]:
        """Answers one request by exactly one target. The caller names the target's engine id as multiplexed model.

        Yields:
            One JSON text; or, for a streamed request, texts of server-sent events; or a `Failure` as the last item.
        """
        try:
            request = _request(route, {**body, "model": target.engine_id})
            stream = await self._start(route, request, target)
            async for item in stream:
                for part in item if isinstance(item, list) else [item]:
                    yield _relabel(_plain(part), target)
        except RaysftError as error:
            yield failure_of(error)
        except Exception as error:
            logger.exception("a request to %s failed", target)
            yield failure_of(error)

    async def _start(self, route: Route, request: BaseModel, target: Target) -> AsyncIterator[Any]:
        """Loads the target's version if need be, and hands the request to the engine."""
        method: Callable[[BaseModel], Awaitable[AsyncIterator[Any]]] = getattr(self, route)
        if target.version is None:
            return await method(request)
        # vLLM refuses the second of two requests that load the same version at the same moment.
        async with self._admission[target.engine_id]:
            try:
                return await method(request)
            except ValueError as error:
                logger.exception("the engine cannot load %s", target)
                raise VersionRefusedError(f"{target} cannot be served: the engine refused to load it") from error


def _request(route: Route, body: dict[str, Any]) -> BaseModel:
    """Builds the engine's request.

    Raises:
        BadRequestError: a field is unknown or its value is not allowed.
    """
    models: dict[str, type[BaseModel]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    model = models.get(route) or (TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest)
    unknown = sorted(set(body) - set(model.model_fields))
    if unknown:
        raise BadRequestError(f"{unknown[0]}: no such field in this request", unknown[0])
    try:
        return model.model_validate(body)
    except ValidationError as error:
        fault = error.errors()[0]
        # Parts of a location that are no field of the request's are names of vLLM's types.
        where = [str(part) for part in fault["loc"] if isinstance(part, int) or part.islower()]
        message = fault["msg"].removeprefix("Value error, ")
        field = ".".join(where)
        raise BadRequestError(f"{field}: {message}" if field else message, where[0] if where else None) from None
    except (VLLMClientError, ValueError) as error:
        raise BadRequestError(str(error), getattr(error, "parameter", None)) from None


def _plain(part: Any) -> str | Failure:
    """One item of the engine's -> text or failure."""
    error: dict[str, Any] | None = None
    if isinstance(part, str):
        if not part.startswith('data: {"error"'):
            return part
        error = json.loads(part.removeprefix("data: "))["error"]
    elif hasattr(part, "error"):
        error = part.error.model_dump()
    if error is None:
        text: str = part.model_dump_json()
        return text
    status = int(error.get("code") or 500)
    if status >= 500:
        logger.error("the engine failed: %s", error.get("message"))
        return failure_of(RuntimeError())
    lines = str(error["message"]).splitlines() or ["the engine refused the request"]
    return Failure(status, lines[0], "invalid_request_error", error.get("param"))


def _relabel(item: str | Failure, target: Target) -> str | Failure:
    """Names the version as users know it where the engine names its own id.

    The text between quotes cannot come from an answer: inside JSON strings every quote is escaped.
    """
    if isinstance(item, Failure) or target.version is None:
        return item
    ours, theirs = (json.dumps(name, ensure_ascii=False) for name in (str(target), target.engine_id))
    return item.replace(f'"model":{theirs}', f'"model":{ours}', 1)


def llm_config(config: ServeConfig) -> LLMConfig:
    """What Ray's LLMServer must know of a config."""
    engine, scaling = config.engine, config.scaling
    arguments: dict[str, Any] = {
        **engine.extra,
        "dtype": _dtype(config),
        "max_model_len": engine.max_model_len,
        "enforce_eager": engine.enforce_eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "enable_lora": True,
        "max_loras": engine.max_loras,
        "max_lora_rank": engine.max_lora_rank,
        "trust_request_chat_template": False,
    }
    environment: dict[str, str] = {}
    placement: dict[str, Any] | None = None
    if engine.use_gpu:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(engine.kv_cache_gib)
        placement = {"bundles": [{"CPU": engine.cpus_per_replica}]}
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": scaling.max_ongoing_requests,
        # The bundle above reserves what a replica on CPU needs; the default would add a CPU to it.
        "ray_actor_options": {"num_cpus": 1 if engine.use_gpu else 0},
    }
    if scaling.min_replicas == scaling.max_replicas:
        deployment["num_replicas"] = scaling.min_replicas
    else:
        deployment["autoscaling_config"] = {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "target_ongoing_requests": max(1, scaling.max_ongoing_requests // 2),
        }
    return LLMConfig(
        model_loading_config={"model_id": config.id, "model_source": config.base},
        accelerator_type=engine.accelerator_type,
        placement_group_config=placement,
        engine_kwargs=arguments,
        lora_config={"max_num_adapters_per_replica": KNOWN_VERSIONS, "download_timeout_s": DOWNLOAD_TIMEOUT_S},
        deployment_config=deployment,
        runtime_env={"env_vars": environment},
    )


def _dtype(config: ServeConfig) -> str:
    """The engine's type: vLLM's own auto takes the checkpoint's, which a CPU may only emulate."""
    if config.engine.dtype != "auto" or config.engine.use_gpu or cpu_has_bfloat16():
        return config.engine.dtype
    return "float32"


def bind_engine(config: ServeConfig) -> Any:
    """Binds the engine's deployment; `config.registry` and `config.base` must be valid on every node."""
    settings = llm_config(config)
    loader = partial(AdapterLoader, config.registry, config.base, config.id, config.engine.max_lora_rank)
    options = EngineServer.get_deployment_options(settings)
    deployment: Any = serve.deployment(EngineServer)
    return deployment.options(**options).bind(settings, model_downloader=loader)
