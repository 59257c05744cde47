"""The HTTP ingress: OpenAI's routes in front of the engines.

A request is pinned to one exact version when it enters; the answer says which (`model` and the header
`x-raysft-version`). Errors have OpenAI's shape and never hold a traceback or a path.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from serve.catalogue import Catalogue
from serve.errors import Failure, NotReadyError, UnknownModelError, failure_of
from serve.registry import Registry
from serve.requests import Route, read_body
from serve.traffic import Target
from serve.versions import Version
from sft.errors import RaysftError

ROUTES: dict[str, Route] = {"/v1/chat/completions": "chat", "/v1/completions": "completions", "/tokenize": "tokenize"}
VERSION_HEADER = "x-raysft-version"
HEALTH_TIMEOUT_S = 10.0
HANDLES = 256

logger = logging.getLogger("ray.serve")


class Engine(Protocol):
    """What a gateway needs of the engines behind it."""

    def answer(self, route: Route, body: dict[str, Any], target: Target) -> AsyncIterator[str | Failure]:
        """Answers a request: one JSON text, or texts of server-sent events; a `Failure` ends it."""
        ...

    async def check(self) -> None:
        """Raises `NotReadyError` unless an engine can answer."""
        ...


class ServeEngine:
    """The engines of a Serve deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle: Any = handle  # its methods are the deployment's, which no type knows
        # A configured handle is costly to make. Targets are resolved before they come here, so clients cannot add any.
        self._handles: OrderedDict[str, Any] = OrderedDict()

    async def answer(self, route: Route, body: dict[str, Any], target: Target) -> AsyncIterator[str | Failure]:
        """See `Engine`."""
        try:
            async for item in self._streaming(target).answer.remote(route, body, target):
                yield item
        except BackPressureError:
            yield failure_of(NotReadyError("the server is full; try again in a moment"))
        except (RayError, RayServeException):
            logger.exception("the engine was lost while it answered")
            yield failure_of(NotReadyError("the engine was lost; try again in a moment"))

    async def check(self) -> None:
        """See `Engine`."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._handle.check_health.remote()
        except (TimeoutError, RayError, RayServeException):
            raise NotReadyError("the engine does not answer") from None

    def _streaming(self, target: Target) -> Any:
        key = target.engine_id
        if key not in self._handles:
            options = {"multiplexed_model_id": key} if target.version else {}
            self._handles[key] = self._handle.options(stream=True, **options)
            if len(self._handles) > HANDLES:
                self._handles.popitem(last=False)
        self._handles.move_to_end(key)
        return self._handles[key]


class Gateway:
    """The routes. One instance a replica; holds no state but what the catalogue last read."""

    def __init__(self, catalogue: Catalogue, engine: Engine, *, max_model_len: int) -> None:
        self._catalogue, self._engine, self._max_model_len = catalogue, engine, max_model_len

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="raysft", docs_url=None, redoc_url=None, openapi_url=None)
        for path, route in ROUTES.items():
            app.add_api_route(path, partial(self.generate, route), methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self.models, methods=["GET"])
        app.add_api_route("/v1/models/{model:path}", self.model, methods=["GET"])
        app.add_api_route("/health", self.health, methods=["GET"])
        app.add_exception_handler(HTTPException, _on_http_error)
        app.add_exception_handler(RaysftError, _on_error)
        app.add_exception_handler(Exception, _on_error)
        return app

    async def generate(self, route: Route, request: Request) -> Response:
        """Chat completions, completions and tokenize: all are one body in, one answer of one version out."""
        body = read_body(route, await request.body())
        target = await self._catalogue.target(body["model"])
        items = self._engine.answer(route, body, target)
        # The first item is awaited before a status is sent, so that an engine's refusal is no broken 200.
        first = await anext(items, None)
        headers = {VERSION_HEADER: str(target)}
        if isinstance(first, Failure):
            return JSONResponse(first.body(), first.status, headers)
        if first is None:
            raise NotReadyError("the engine gave no answer; try again")
        if body.get("stream"):
            return StreamingResponse(_events(first, items), headers=headers, media_type="text/event-stream")
        return Response(first, headers=headers, media_type="application/json")

    async def models(self) -> dict[str, Any]:
        """The base model, every alias and every version."""
        return {"object": "list", "data": await self._cards()}

    async def model(self, model: str) -> dict[str, Any]:
        """One model."""
        await self._catalogue.target(model)
        found = next((card for card in await self._cards() if card["id"] == model), None)
        if found is None:
            raise UnknownModelError(f"the model {model!r} is damaged in the registry")
        return found

    async def health(self) -> dict[str, str]:
        """200 when this gateway and an engine behind it can answer."""
        await self._engine.check()
        return {"status": "ok"}

    async def _cards(self) -> list[dict[str, Any]]:
        versions = await self._catalogue.versions()
        known = await self._catalogue.known()
        by_id = {version.id: version for version in versions}
        base = {**_card(known.base_id, 0, known.base_id, None), "max_model_len": self._max_model_len}
        aliases = [
            {**_version_card(alias, by_id[version], known.base_id), "root": str(version)}
            for alias, version in sorted(known.aliases.items())
            if version in by_id and alias != known.base_id
        ]
        return [base, *aliases, *(_version_card(str(version.id), version, known.base_id) for version in versions)]


def _card(model: str, created: int, root: str, parent: str | None) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": created, "owned_by": "raysft", "root": root, "parent": parent}


def _version_card(model: str, version: Version, base_id: str) -> dict[str, Any]:
    bundle = version.bundle
    # Of the lineage only what holds no path: a run's config stays with the registry.
    lineage = {key: bundle.lineage[key] for key in ("run", "data_fingerprint", "metrics") if key in bundle.lineage}
    metadata = {
        "version": str(version.id),
        "digest": version.digest,
        "rank": bundle.rank,
        "base_fingerprint": bundle.base_fingerprint,
        "template_fingerprint": bundle.template_fingerprint,
        "published_by": version.published_by,
        "lineage": lineage,
    }
    card = _card(model, int(version.published_at.timestamp()), str(version.id), base_id)
    return {**card, "metadata": metadata}


async def _events(first: str, items: AsyncIterator[str | Failure]) -> AsyncIterator[str]:
    """The stream. After a failure there is no [DONE], so that nobody takes a torn answer for a whole one."""
    yield first
    async for item in items:
        if isinstance(item, Failure):
            yield f"data: {json.dumps(item.body())}\n\n"
            return
        yield item


async def _on_http_error(_: Request, error: Exception) -> Response:
    """Unknown routes, wrong methods and the like, which the framework itself refuses."""
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    failure = Failure(error.status_code, str(error.detail), "invalid_request_error", None, code)
    return JSONResponse(failure.body(), failure.status, error.headers)


async def _on_error(_: Request, error: Exception) -> Response:
    failure = failure_of(error)
    if failure.status >= 500:
        logger.error("a request failed: %s", error, exc_info=None if isinstance(error, RaysftError) else error)
    return JSONResponse(failure.body(), failure.status)


@serve.ingress()
class GatewayServer:
    """The gateway as a Serve deployment."""

    def __init__(self, base_id: str, registry: str, max_model_len: int, engine: DeploymentHandle[Any]) -> None:
        catalogue = Catalogue(base_id, partial(Registry.open, registry))
        self._gateway = Gateway(catalogue, ServeEngine(engine), max_model_len=max_model_len)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve once the constructor is through."""
        return self._gateway.app()
