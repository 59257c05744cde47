"""A gateway in front of an engine that is a stand-in; tests/engine has the real one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import httpx
from starlette.types import ASGIApp

from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.errors import Failure, NotReadyError
from serve.fleet import Prepared, ReplicaStatus
from serve.gateway import Gateway
from serve.items import DONE, Final, Item, Usage
from serve.keys import Key, KeySource, hash_key
from serve.registry import Registry
from serve.requests import Route
from serve.traffic import Target
from serve.versions import VersionId

URL = "http://127.0.0.1:8000"
CHAT: dict[str, Any] = {"model": "support", "messages": [{"role": "user", "content": "hi"}]}
USAGE = Usage(7, 3, "stop")
Part = Item | Exception | float | asyncio.Event
STREAM: list[Item] = ["data: 1\n\n", "data: 2\n\n", Final(f"data: 3\n\n{DONE}", USAGE)]


class StandIn:
    """Answers with what it was asked, or with the items it was given.

    Among the items a number is a pause in seconds, and an event is waited for.
    """

    def __init__(self) -> None:
        self.items: Sequence[Part] | None = None
        self.asked: list[tuple[Route, dict[str, Any], Target]] = []
        self.ids: list[str] = []
        self.stopped = 0
        self.down = False

    async def answer(
        self, route: Route, body: dict[str, Any], target: Target, request_id: str
    ) -> AsyncGenerator[Item, None]:
        self.asked.append((route, body, target))
        self.ids.append(request_id)
        told, ended = self.said(target.version), False
        try:
            for item in self.own_items(target) if told is None else told:
                await asyncio.sleep(item if isinstance(item, float) else 0)
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, asyncio.Event):
                    await item.wait()
                elif not isinstance(item, float):
                    ended = isinstance(item, Final | Failure)
                    yield item
        finally:
            self.stopped += not ended

    def own_items(self, target: Target) -> Sequence[Part]:
        """The answer where none was given."""
        return [Final(json.dumps({"by": str(target)}), USAGE)]

    def said(self, version: VersionId | None) -> Sequence[Part] | None:  # noqa: ARG002
        """What it was told to answer for a version; None where it answers with what it was asked."""
        return self.items

    async def check(self) -> None:
        if self.down:
            raise NotReadyError("the engine does not answer")


class StandInFleet:
    """Replicas that hold whatever they are asked to hold, but for what `refused` has."""

    def __init__(self) -> None:
        self.refused: dict[VersionId, str] = {}
        self.asked: list[list[VersionId]] = []
        self.down = False

    async def prepare(self, versions: Collection[VersionId]) -> Prepared:
        self._check()
        self.asked.append(list(versions))
        return Prepared(2, {version: self.refused[version] for version in versions if version in self.refused}, 0.25)

    async def statuses(self) -> Mapping[str, ReplicaStatus]:
        self._check()
        resident = tuple(str(version) for asked in self.asked for version in asked)
        return {
            name: ReplicaStatus(resident, MappingProxyType({"support": 1}), len(resident), 0.5, 0)
            for name in ("engine#a", "engine#b")
        }

    def _check(self) -> None:
        if self.down:
            raise NotReadyError("no replica answers")


class Keys:
    """Makes keys for a test, and the lines of a file of them."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, **fields: Any) -> dict[str, str]:
        """Adds a key and returns the headers of its requests."""
        text = f"raysft_{name}_secret"
        self.lines.append(Key(id=name, hash=hash_key(text), **fields).model_dump_json(exclude_none=True))
        return {"authorization": f"Bearer {text}"}

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def gateway_app(
    engine: StandIn,
    registry: Registry,
    keys: str = "",
    clock: Callable[[], float] | None = None,
    fleet: StandInFleet | None = None,
    **config: Any,
) -> ASGIApp:
    """The whole application, but for Serve and the engine."""
    made = ServeConfig.model_validate({"registry": "r", "base": "base", "engine": {"max_model_len": 512}, **config})
    catalogue = Catalogue(made.id, lambda: registry)
    clocks = {"clock": clock} if clock else {}
    replicas = fleet or StandInFleet()
    return Gateway(catalogue, engine, replicas, lambda: registry, made, KeySource(None, keys), **clocks).app()


def client_of(app: ASGIApp, **options: Any) -> httpx.AsyncClient:
    """A client on this machine."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False), base_url=URL, **options)
