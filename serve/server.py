"""The vLLM deployment: Ray's LLMServer, which holds the versions that are wanted and answers in plain data.

A gateway sends a JSON object and an exact version; it gets the items of serve/items.py: never an object of vLLM's and
never a traceback. A replica follows the registry by itself: it is ready only when it holds what the aliases name.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Any

from pydantic import BaseModel, ValidationError
from ray import serve
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import LLMServer
from ray.serve.llm.openai_api_models import ChatCompletionRequest, CompletionRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
from vllm.exceptions import VLLMClientError

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.cpu_executor import CpuEngine
from serve.cpu_worker import CpuWorker
from serve.engines import LOST
from serve.errors import BadRequestError, Failure, NotReadyError, VersionRefusedError, failure_of
from serve.fleet import Holding, ReplicaStatus
from serve.gather import gathered
from serve.items import ERROR, EventJoiner, Final, Item, Usage
from serve.leave import leave, tie_children
from serve.loader import AdapterLoader, Loaded
from serve.probe import prove
from serve.pulse import Pulse
from serve.registry import Registry
from serve.relay import Relay, Ticket
from serve.requests import Route
from serve.residents import Residents
from serve.slots import Slots
from serve.traffic import Target
from serve.versions import VersionId
from sft.errors import RaysftError
from sft.hardware import cpu_has_bfloat16

DEPLOYMENT = "engine"
HEALTH_PERIOD_S = 10.0
FOLLOW_S = 0.5
"""How often a replica looks whether other versions are wanted."""
HAND_OVER_S = 0.02
"""The shortest time between two hand-overs of a stream to its gateway: tokens that come faster travel together."""

logger = logging.getLogger("ray.serve")


class EngineServer(LLMServer):
    """One replica: a vLLM engine and the versions that it holds."""

    async def __init__(self, llm_config: LLMConfig, config: ServeConfig) -> None:  # type: ignore[misc]  # as Ray has it
        self._base_id, self._tag = config.id, serve.get_replica_context().replica_tag
        self._loader = AdapterLoader(config.registry, config.base, config.id, config.engine.max_lora_rank)
        self._catalogue = Catalogue(config.id, partial(Registry.open, config.registry))
        self._residents = Residents(self._load_version, self._unload_version, config.engine.resident_versions)
        self._relay = Relay()
        self._generations: Mapping[str, int] = {}
        await super().__init__(llm_config, engine_cls=None if config.engine.use_gpu else CpuEngine)
        self._guard = tie_children()
        # Ray 2.60 looks for the tokenizer routes under the name that they had before vLLM 0.29.
        engine: Any = self.engine
        if engine._oai_serving_tokenization is None:
            engine._oai_serving_tokenization = engine._app_state.serving_tokenization
        self._slots = Slots(engine)
        if not config.engine.use_gpu:
            await self._slots.group_by_slot()
        self._pulse = Pulse(self._slots.beat, config.scaling.stall_s)
        await self._reconcile()
        self._following = asyncio.create_task(self._follow())

    async def answer(
        self, route: Route, body: dict[str, Any], target: Target, request_id: str
    ) -> AsyncIterator[Item | Ticket]:
        """Answers one request by exactly one target, which this replica holds until the last token.

        A caller that stops reading, or cancels, stops the engine's work on the request.

        Yields:
            One `Final` with a JSON text; or, for a streamed request, perhaps a `Ticket`, then those texts of
            server-sent events that the ticket's holder has not read, and a `Final`; or a `Failure` as the last item.
        """
        async with aclosing(self._answer(route, body, target, request_id)) as items:
            if body.get("stream") is not True:
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
            with self._pulse.work():
                async with self._held(target) as loaded:
                    request = _request(route, {**body, "model": target.engine_id}, request_id, loaded)
                    method: Callable[[BaseModel], Awaitable[AsyncGenerator[Any, None]]] = getattr(self, route)
                    # Closed by name: the engine must hear at once that nobody reads on, not when garbage is collected.
                    async with aclosing(await method(request)) as stream:
                        joiner, names = EventJoiner(show_usage=_wants_usage(body)), _names(target)
                        async for found in stream:
                            self._pulse.beat()
                            for item in _items(found if isinstance(found, list) else [found], joiner, request_id):
                                yield _blamed(_relabel(item, names), dead=self._slots.dead)
                                if isinstance(item, Failure):
                                    return
        except RaysftError as error:
            yield failure_of(error)
        except Exception as error:
            logger.exception("request %s to %s failed", request_id, target)
            yield _blamed(failure_of(error), dead=self._slots.dead)

    async def hold(self, versions: Collection[VersionId]) -> tuple[str, Holding]:
        """Loads and proves versions; tells this replica's name and which are unfit, or why none could be loaded."""
        try:
            return self._tag, Holding(await self._residents.hold(versions))
        except RaysftError as error:
            return self._tag, Holding({}, failure_of(error))

    async def status(self) -> tuple[str, ReplicaStatus]:
        """This replica's name, and what it holds and has done."""
        residents = self._residents
        return self._tag, ReplicaStatus(
            resident=tuple(map(str, residents.versions)),
            generations=dict(self._generations),
            loads=residents.loads,
            load_seconds=residents.load_seconds,
            evictions=residents.evictions,
        )

    async def check_health(self) -> None:
        """Called by Serve; ends this replica where the engine is dead, or has work and makes no progress."""
        try:
            await super().check_health()
            await self._pulse.check()
        except Exception as error:
            if isinstance(error, NotReadyError) or self._slots.dead:
                leave(str(error))
            raise

    def _batch_output_stream(self, generator: AsyncGenerator[Any, None]) -> AsyncGenerator[list[Any], None]:
        """Called by Ray's server for streams. Its own batches wait for a timer, which holds the first token up, too."""
        return gathered(generator, HAND_OVER_S)

    def _held(self, target: Target) -> Any:
        return nullcontext() if target.version is None else self._residents.use(target.version)

    async def _follow(self) -> None:
        """Goes after the registry, for ever; what cannot be done now is tried again."""
        while True:
            await asyncio.sleep(FOLLOW_S)
            if self._slots.dead:
                leave("its engine died")
            try:
                await self._reconcile()
            except RaysftError as error:
                logger.warning("this replica cannot follow the registry now: %s", error)
            except Exception:
                logger.exception("this replica could not follow the registry")

    async def _reconcile(self) -> None:
        """Brings what this replica holds to what is wanted, and acknowledges the aliases' entries."""
        known, generations = await self._catalogue.known(), self._catalogue.generations()
        refused = await self._residents.want(known.kept(), known.retired)
        self._generations = {
            alias: number for alias, (number, versions) in generations.items() if not versions & refused.keys()
        }

    async def _load_version(self, version: VersionId) -> Loaded:
        loaded = await self._loader.load(version)
        name = Target(self._base_id, version).engine_id
        try:
            await self._slots.load(name, str(loaded.folder))
        except ValueError as error:
            logger.exception("the engine cannot load %s", version)
            raise VersionRefusedError(f"{version} cannot be served: the engine refused to load it") from error
        try:
            tokenize, tuned = partial(self._prompt_ids, loaded, name), partial(self._slots.next_token, engine_id=name)
            await prove(version, loaded.bundle.golden, tokenize, tuned, self._slots.next_token)
        except BaseException:
            await self._slots.unload(name)
            raise
        return loaded

    async def _unload_version(self, version: VersionId, _: Loaded) -> None:
        await self._slots.unload(Target(self._base_id, version).engine_id)

    async def _prompt_ids(self, loaded: Loaded, name: str, messages: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        """What the chat route makes of messages, by the engine's own code."""
        request: Any = _request("tokenize", {"model": name, "messages": list(messages)}, "", loaded)
        async for part in await self.tokenize(request):
            if hasattr(part, "tokens"):
                ids: list[int] = part.tokens
                return ids
        raise NotReadyError(f"the engine could not make the prompt of {loaded.version}")


def _request(route: Route, body: dict[str, Any], request_id: str, loaded: Loaded | None = None) -> BaseModel:
    """Builds the engine's request: the client's own, but with the gateway's id, and with the usage of every stream.

    A version brings the chat template that it was trained with, and the ids that end its turns.

    Raises:
        BadRequestError: a field is unknown or its value is not allowed.
    """
    models: dict[str, type[BaseModel]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    model = models.get(route) or (TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest)
    unknown = sorted(set(body) - set(model.model_fields))
    if unknown:
        raise BadRequestError(f"{unknown[0]}: no such field in this request", unknown[0])
    if body.get("chat_template") is not None:
        raise BadRequestError("chat_template: may not be set; each version brings its own", "chat_template")
    if loaded is not None and "messages" in body:
        body = {**body, **_of_training(loaded, model, body)}
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


def _of_training(loaded: Loaded, model: type[BaseModel], body: dict[str, Any]) -> dict[str, Any]:
    """What a version adds to a chat request, so that it is made and ended as in training."""
    added: dict[str, Any] = {} if loaded.template is None else {"chat_template": loaded.template}
    if loaded.stop_ids and "stop_token_ids" in model.model_fields:
        added["stop_token_ids"] = [*(body.get("stop_token_ids") or []), *loaded.stop_ids]
    return added


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


def _blamed(item: Item, *, dead: bool) -> Item:
    """What failed because the engine is dead is not the request's fault: another replica can answer it."""
    failed = isinstance(item, Failure) and item.status >= 500
    return failure_of(NotReadyError(LOST)) if failed and dead else item


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
        "max_cpu_loras": max(engine.resident_versions, engine.max_loras),
        # A version's own template is applied so; what a client sends as one is refused before.
        "trust_request_chat_template": True,
    }
    if engine.tool_call_parser:
        arguments |= {"tool_call_parser": engine.tool_call_parser, "enable_auto_tool_choice": True}
    if engine.reasoning_parser:
        arguments["reasoning_parser"] = engine.reasoning_parser
    environment: dict[str, str] = {}
    placement: dict[str, Any] | None = None
    if engine.use_gpu:
        arguments["gpu_memory_utilization"] = engine.gpu_memory_utilization
    else:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(engine.kv_cache_gib)
        arguments["worker_extension_cls"] = f"{CpuWorker.__module__}.{CpuWorker.__name__}"
        placement = {"bundles": [{"CPU": engine.cpus_per_replica}]}
    deployment: dict[str, Any] = {
        "name": DEPLOYMENT,
        "max_ongoing_requests": scaling.max_ongoing_requests,
        "graceful_shutdown_timeout_s": scaling.drain_s,
        "graceful_shutdown_wait_loop_s": min(1.0, scaling.drain_s),
        "health_check_period_s": min(HEALTH_PERIOD_S, scaling.stall_s),
        "health_check_timeout_s": scaling.stall_s + HEALTH_PERIOD_S,
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
    options = EngineServer.get_deployment_options(settings)
    deployment: Any = serve.deployment(EngineServer)
    return deployment.options(**options).bind(settings, config)
