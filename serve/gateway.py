"""The HTTP ingress: OpenAI's routes in front of the engines.

A request is let in by its key, checked, pinned to one exact version and answered; the answer says which version
(`model` and the header `x-raysft-version`). Errors have OpenAI's shape and never hold a traceback or a path.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client.metrics_core import Metric
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.access_log import AccessLog
from serve.admin import Admin
from serve.answer import VERSION_HEADER, Answer
from serve.body import read_bytes
from serve.cards import model_cards
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.door import Door, check_model, check_scope, client_of
from serve.engines import Engine, ServeEngine
from serve.errors import ClientGoneError, Failure, UnknownModelError, failure_of
from serve.exposition import CONTENT_TYPE, FleetMetrics, Replicas, exposition
from serve.fleet import Fleet, ServeFleet
from serve.front import Front, record_of
from serve.guard import Guard, Peers, Seen
from serve.keys import Key, KeySource
from serve.keys import Scope as KeyScope
from serve.limits import Limiter
from serve.metrics import Metrics
from serve.moves import Moves
from serve.page import chat_page
from serve.question import SESSION_HEADER, Question, session_of
from serve.registry import Registry
from serve.requests import Route, read_body, tokens_asked
from serve.shadow import Shadows
from serve.versions import VersionId
from sft.errors import RaysftError

ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/tokenize": "tokenize"}
SIBLINGS_S = 5.0

logger = logging.getLogger("ray.serve")


class Gateway:
    """The routes. One instance a replica; it keeps what the limits and the metrics count, and nothing that matters.

    Args:
        catalogue: what can be asked for.
        engine: what answers.
        fleet: the engine replicas as a whole.
        open_registry: opens the registry, for the admin routes.
        config: the application's.
        keys: the API keys in force.
        clock: seconds, ever growing, for the limits.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        engine: Engine,
        fleet: Fleet,
        open_registry: Callable[[], Registry],
        config: ServeConfig,
        keys: KeySource,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue, self._engine, self._config = catalogue, engine, config
        self._door = Door(keys, open_to_all=config.access.open)
        self._limiter = Limiter(config.limits, config.total_concurrency, config.scaling.gateway_replicas, clock)
        self._log = AccessLog(config.log.access_file, prompts=config.log.prompts)
        self.metrics = Metrics(lambda: self._limiter.running)
        self._fleet_metrics = FleetMetrics(fleet)
        self._shadows = Shadows(engine, config, self._log, self.metrics)
        self.guard = Guard(config.guard, catalogue, open_registry, self.metrics)
        enter = partial(self._enter, scope="admin")
        self._admin = Admin(open_registry, fleet, enter)
        self._moves = Moves(open_registry, catalogue, fleet, enter, self._log, self.metrics)

    def app(
        self,
        replicas: Callable[[], Awaitable[Replicas]] | None = None,
        peers: Peers | None = None,
        *,
        returns_ids: bool = False,
    ) -> ASGIApp:
        """The ASGI application.

        Args:
            replicas: collects the metrics of all gateway replicas; by default there is only this one.
            peers: collects what the guards of all gateway replicas have seen, likewise.
            returns_ids: whether the server in front sends the client's `x-request-id` back by itself.
        """
        app = FastAPI(
            title="raysft", docs_url=None, redoc_url=None, openapi_url=None, lifespan=partial(self._life, peers)
        )
        for path, route in ROUTES.items():
            app.add_api_route(path, partial(self.generate, route), methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_api_route("/", chat_page, methods=["GET"])
        app.add_api_route("/metrics", partial(self.exposition, replicas), methods=["GET"], response_model=None)
        for method, path, handler in (*self._admin.routes(), *self._moves.routes()):
            app.add_api_route(path, handler, methods=[method])
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(RaysftError, _on_error)
        app.add_exception_handler(Exception, _on_error)
        return Front(app, self._log, self.metrics, returns_ids=returns_ids)

    async def generate(self, route: Route, request: Request) -> Response:
        """Chat completions, completions and tokenize: all are one body in, one answer of one version out."""
        key = self._enter(request, "chat")
        record, config = record_of(request.scope), self._config
        data = await read_bytes(request, config.caps.body_bytes, config.limits.body_s)
        body = read_body(route, data, config.caps, config.max_tokens)
        record.model, record.stream = body["model"], body.get("stream") is True
        record.prompt = body.get("messages", body.get("prompt")) if config.log.prompts else None
        check_model(key, body["model"])
        session = session_of(request.headers.get(SESSION_HEADER), body)
        choice = await self._catalogue.choose(body["model"], session)
        record.version, record.part = str(choice.target), choice.part
        question = Question(route, body, choice, key, *tokens_asked(route, body, len(data)))
        return Answer(question, self._engine, self._shadows, self.guard, self._limiter, config.limits, record)

    async def models(self, request: Request) -> dict[str, Any]:
        """The base model, every alias and every version, as far as the key may use them."""
        key = self._enter(request, "chat")
        return {"object": "list", "data": [card for card in await self._cards() if key.may_use(card["id"])]}

    async def model(self, request: Request, model: str) -> dict[str, Any]:
        """One model."""
        check_model(self._enter(request, "chat"), model)
        await self._catalogue.target(model)
        found = next((card for card in await self._cards() if card["id"] == model), None)
        if found is None:
            raise UnknownModelError(f"the model {model!r} is retired, or damaged in the registry")
        return found

    async def health(self) -> dict[str, str]:
        """200 when this gateway and an engine behind it can answer."""
        await self._engine.check()
        return {"status": "ok"}

    async def exposition(self, replicas: Callable[[], Awaitable[Replicas]] | None, request: Request) -> Response:
        """The metrics, as Prometheus reads them."""
        self._enter(request, "metrics")
        gateways = await replicas() if replicas else {"0": self.metrics.families()}
        return Response(exposition({**gateways, **await self._fleet_metrics.read()}), media_type=CONTENT_TYPE)

    @asynccontextmanager
    async def _life(self, peers: Peers | None, _: FastAPI) -> AsyncIterator[None]:
        self.guard.start(peers)
        yield
        await self.guard.close()
        await self._shadows.close()

    def _enter(self, request: Request, scope: KeyScope) -> Key:
        key = self._door.enter(client_of(request.scope), request.headers)
        record_of(request.scope).key = key.id
        check_scope(key, scope)
        return key

    async def _cards(self) -> list[dict[str, Any]]:
        versions = await self._catalogue.versions()
        return model_cards(await self._catalogue.known(), versions, self._config.engine.max_model_len)


class _Silent(Response):
    """Says nothing, to a client that is gone."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends nothing."""


async def _on_http_error(request: Request, error: Exception) -> Response:
    """Unknown routes, wrong methods and the like, which the framework itself refuses."""
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    record_of(request.scope).error = code or "bad_request"
    failure = Failure(error.status_code, str(error.detail), "invalid_request_error", None, code)
    return JSONResponse(failure.body(), failure.status, error.headers)


async def _on_error(request: Request, error: Exception) -> Response:
    failure, record = failure_of(error), record_of(request.scope)
    record.error, record.limit = failure.code or "bad_request", getattr(error, "limit", None)
    if isinstance(error, ClientGoneError):
        return _Silent()
    if failure.status >= 500:
        trace = None if isinstance(error, RaysftError) else error
        logger.error("request %s failed: %s", record.request_id, error, exc_info=trace)
    version = {VERSION_HEADER: record.version} if record.version else {}
    return JSONResponse(failure.body(), failure.status, {**dict(failure.headers), **version})


@serve.ingress()
class GatewayServer:
    """The gateway as a Serve deployment.

    Args:
        config: the application's; its addresses must be valid on every node.
        further_keys: lines with API keys beside those of the config's file.
        engine: the engines' deployment.
    """

    def __init__(self, config: ServeConfig, further_keys: str, engine: DeploymentHandle[Any]) -> None:
        open_registry = partial(Registry.open, config.registry)
        keys = KeySource(config.access.keys, further_keys)
        fleet = ServeFleet(engine)

        async def prepare(versions: frozenset[VersionId]) -> Mapping[VersionId, str]:
            return (await fleet.prepare(versions)).refused

        catalogue = Catalogue(config.id, open_registry, prepare)
        self._replicas = config.scaling.gateway_replicas
        self._gateway = Gateway(catalogue, ServeEngine(engine), fleet, open_registry, config, keys)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve once the constructor is through."""
        return self._gateway.app(self._all_metrics, self._all_seen, returns_ids=True)

    async def metrics(self) -> tuple[str, list[Metric]]:
        """This replica's name and metrics; called by its siblings."""
        return serve.get_replica_context().replica_tag, self._gateway.metrics.families()

    async def _all_metrics(self) -> Replicas:
        """The metrics of every replica, whichever is asked; of this one alone while the others do not answer."""
        return dict(await self._siblings("metrics") or [await self.metrics()])

    async def seen(self) -> Seen:
        """What this replica's guard has seen; called by its siblings."""
        return self._gateway.guard.seen()

    async def _all_seen(self) -> list[Seen]:
        """What the guards of all replicas have seen; only this one's while the others do not answer."""
        return await self._siblings("seen") or [self._gateway.guard.seen()]

    async def _siblings(self, method: str) -> list[Any]:
        """What every replica says, this one among them; nothing where it is the only one, or not all answer."""
        if self._replicas == 1:
            return []
        context = serve.get_replica_context()
        siblings: Any = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            async with asyncio.timeout(SIBLINGS_S):
                return list(await siblings.broadcast(method).results_async())
        except (TimeoutError, RayError, RayServeException) as error:
            logger.warning("of the gateways only this one could be asked for its %s: %s", method, error)
            return []
