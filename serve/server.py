"""The vLLM deployment: Ray's LLMServer with our loader, answering in plain data.

This is the only file that knows the engine. A gateway sends a JSON object and an exact version; it gets the items of
serve/items.py: never an object of vLLM's and never a traceback.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import ray
from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.exceptions import VLLMClientError

from serve.config import ServeConfig
from serve.errors import BadRequestError, Failure, VersionRefusedError, failure_of
from serve.gather import gathered
from serve.items import ERROR, EventJoiner, Final, Item, Usage
from serve.loader import AdapterLoader
from serve.relay import Relay, Ticket
from serve.requests import Route
from serve.traffic import Target
from sft.errors import RaysftError
from sft.hardware import cpu_has_bfloat16

DEPLOYMENT = "engine"
DOWNLOAD_TIMEOUT_S = 300.0
HAND_OVER_S = 0.02
"""The shortest time between two hand-overs of a stream to its gateway: tokens that come faster travel together."""
KNOWN_VERSIONS = 100_000
"""How many versions a replica remembers the folders of. The engine itself swaps weights in and out of its few slots;
forgetting a folder would free nothing and only cause it to be verified again."""

logger = logging.getLogger("ray.serve")


class EngineServer(LLMServer):
    """One replica: a vLLM engine and the versions that it has loaded."""

    async def __init__(self, llm_config: LLMConfig, *, model_downloader: Any) -> None:  # type: ignore[misc]  # as Ray has it
        self._relay = None if _encrypted() else Relay(ray.util.get_node_ip_address())
        self._admission: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        await super().__init__(llm_config, model_downloader=model_downloader)
        # Ray 2.60 looks for the tokenizer routes under the name that they had before vLLM 0.29.
        engine: Any = self.engine
        if engine._oai_serving_tokenization is None:
            engine._oai_serving_tokenization = engine._app_state.serving_tokenization

    async def answer(
        self, route: Route, body: dict[str, Any], target: Target, request_id: str
    ) -> AsyncIterator[Item | Ticket]:
        """Answers one request by exactly one target. The caller names the target's engine id as multiplexed model.

        A caller that stops reading, or cancels, stops the engine's work on the request.

        Yields:
            One `Final` with a JSON text; or, for a streamed request, perhaps a `Ticket`, then those texts of
            server-sent events that the ticket's holder has not read, and a `Final`; or a `Failure` as the last item.
        """
        async with aclosing(self._answer(route, body, target, request_id)) as items:
            if not (self._relay and body.get("stream") is True):
                async for item in items:
                    yield item
                return
            async with self._relay.sender() as sender:
                yield sender.ticket
                async for item in items:
                    if isinstance(item, str):
                        if not await sender.send(item):
                            yield item
                        continue
                    sender.close()
                    yield item

    async def _answer(
        self, route: Route, body: dict[str, Any], target: Target, request_id: str
    ) -> AsyncGenerator[Item, None]:
        try:
            request = _request(route, {**body, "model": target.engine_id}, request_id)
            # Closed by name: the engine must hear at once that nobody reads on, not when the garbage is collected.
            async with aclosing(await self._start(route, request, target, request_id)) as stream:
                joiner, names = EventJoiner(show_usage=_wants_usage(body)), _names(target)
                async for found in stream:
                    for item in _items(found if isinstance(found, list) else [found], joiner, request_id):
                        yield _relabel(item, names)
                        if isinstance(item, Failure):
                            return
        except RaysftError as error:
            yield failure_of(error)
        except Exception as error:
            logger.exception("request %s to %s failed", request_id, target)
            yield failure_of(error)

    def _batch_output_stream(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
        """Called by Ray's server for streams. Its own batches wait for a timer, which holds the first token up, too."""
        return gathered(generator, HAND_OVER_S)

    async def _start(
        self, route: Route, request: BaseModel, target: Target, request_id: str
    ) -> AsyncGenerator[Any, None]:
        """Loads the target's version if need be, and hands the request to the engine."""
        method: Callable[[BaseModel], Awaitable[AsyncGenerator[Any, None]]] = getattr(self, route)
        if target.version is None:
            return await method(request)
        # vLLM refuses the second of two requests that load the same version at the same moment.
        async with self._admission[target.engine_id]:
            try:
                return await method(request)
            except ValueError as error:
                logger.exception("the engine cannot load %s for request %s", target, request_id)
                raise VersionRefusedError(f"{target} cannot be served: the engine refused to load it") from error


def _encrypted() -> bool:
    """Whether what goes from node to node on this cluster must be encrypted, which only Ray's own calls are."""
    return os.environ.get("RAY_USE_TLS", "0").lower() not in ("0", "false", "")


def _request(route: Route, body: dict[str, Any], request_id: str) -> BaseModel:
    """Builds the engine's request: the client's own, but with the gateway's id, and with the usage of every stream.

    Raises:
        BadRequestError: a field is unknown or its value is not allowed.
    """
    models: dict[str, type[BaseModel]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    model = models.get(route) or (TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest)
    unknown = sorted(set(body) - set(model.model_fields))
    if unknown:
        raise BadRequestError(f"{unknown[0]}: no such field in this request", unknown[0])
    if "request_id" in model.model_fields:
        body = {**body, "request_id": request_id}
    options = body.get("stream_options")
    if body.get("stream") is True and (options is None or isinstance(options, dict)) and not _wants_usage(body):
        body = {**body, "stream_options": {"include_usage": True}}
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


def _wants_usage(body: dict[str, Any]) -> bool:
    """Whether the client itself asked for the event with the usage."""
    options = body.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _items(parts: Sequence[Any], joiner: EventJoiner, request_id: str) -> list[Item]:
    """What the engine gave at one time -> items."""
    events: list[str] = []
    last: list[Item] = []
    for part in parts:
        error = _error(part)
        if error is None and isinstance(part, str):
            events.append(part)
            continue
        last = [_final(part) if error is None else _failure(error, request_id)]
        break
    joined = joiner.join(events) if events else ""
    return [joined, *last] if joined else last


def _error(part: Any) -> dict[str, Any] | None:
    """The error that one of the engine's parts says, if it does."""
    if isinstance(part, str):
        return dict(json.loads(part.removeprefix("data: "))["error"]) if part.startswith(ERROR) else None
    return dict(part.error.model_dump()) if hasattr(part, "error") else None


def _failure(error: dict[str, Any], request_id: str) -> Failure:
    status = int(error.get("code") or 500)
    if status >= 500:
        logger.error("the engine failed at request %s: %s", request_id, error.get("message"))
        return failure_of(RuntimeError())
    lines = str(error["message"]).splitlines() or ["the engine refused the request"]
    return Failure(status, lines[0], "invalid_request_error", error.get("param"))


def _final(part: Any) -> Final:
    """A whole answer."""
    text: str = part.model_dump_json()
    usage = getattr(part, "usage", None)
    if usage is None:
        return Final(text, Usage(getattr(part, "count", 0), 0))
    reason = part.choices[-1].finish_reason if part.choices else None
    return Final(text, Usage(usage.prompt_tokens, usage.completion_tokens or 0, reason))


def _names(target: Target) -> tuple[str, str]:
    """How the engine names a target in what it writes, and how users know it.

    The text between quotes cannot come from an answer: inside JSON strings every quote is escaped.
    """
    theirs, ours = (f'"model":{json.dumps(name, ensure_ascii=False)}' for name in (target.engine_id, str(target)))
    return theirs, ours


def _relabel(item: Item, names: tuple[str, str]) -> Item:
    """Names the version as users know it where the engine names its own id."""
    if isinstance(item, str):
        return item.replace(*names)
    return Final(item.text.replace(*names), item.usage) if isinstance(item, Final) else item


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
