"""The routes under /admin that only look: what the registry and the replicas hold. They need the scope admin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from serve.errors import UnknownModelError, VersionRefusedError
from serve.fleet import Fleet
from serve.keys import Key
from serve.registry import Registry
from serve.versions import VersionId, summary

Enter = Callable[[Request], Key]
"""Lets a request with the scope admin in, or raises."""


class Admin:
    """The routes.

    Args:
        open_registry: opens the registry; each request does, and never on the event loop.
        fleet: the engine replicas.
        enter: lets requests in.
    """

    def __init__(self, open_registry: Callable[[], Registry], fleet: Fleet, enter: Enter) -> None:
        self._open, self._fleet, self._enter = open_registry, fleet, enter

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/admin/versions", self.versions),
            ("GET", "/admin/versions/{version}", self.version),
            ("GET", "/admin/aliases", self.aliases),
            ("GET", "/admin/aliases/{alias}/history", self.history),
            ("GET", "/admin/replicas", self.replicas),
        ]

    async def versions(self, request: Request) -> dict[str, Any]:
        """All versions, and the aliases that point at each; of damaged ones a line with the reason."""
        self._enter(request)

        def read() -> dict[str, Any]:
            registry = self._open()
            pointing: dict[VersionId, list[str]] = {}
            for alias, entry in registry.aliases().items():
                pointing.setdefault(entry.version, []).append(alias)
            wanted = registry.version_ids()
            registry.preload(wanted)
            versions, damaged = [], []
            for version in wanted:
                try:
                    versions.append({**summary(registry.get(version)), "aliases": pointing.get(version, [])})
                except VersionRefusedError as error:
                    damaged.append(str(error))
            return {"versions": versions, "damaged": damaged}

        return await asyncio.to_thread(read)

    async def version(self, request: Request, version: str) -> dict[str, Any]:
        """One version with its lineage, whole, and its evaluations."""
        self._enter(request)

        def read() -> dict[str, Any]:
            registry = self._open()
            found = registry.get(VersionId.parse(version))
            files = {name: file.size for name, file in found.bundle.files.items()}
            evaluations = [one.model_dump(mode="json") for one in registry.evaluations(found.id)]
            return {**summary(found), "files": files, "lineage": found.bundle.lineage, "evaluations": evaluations}

        return await asyncio.to_thread(read)

    async def aliases(self, request: Request) -> dict[str, Any]:
        """What every alias serves, by its newest entry."""
        self._enter(request)
        entries = await asyncio.to_thread(lambda: self._open().aliases())
        return {"aliases": {alias: entry.model_dump(mode="json") for alias, entry in entries.items()}}

    async def history(self, request: Request, alias: str) -> dict[str, Any]:
        """All moves of an alias, oldest first."""
        self._enter(request)
        entries = await asyncio.to_thread(lambda: self._open().history(alias))
        if not entries:
            raise UnknownModelError(f"there is no alias {alias}")
        return {"history": [entry.model_dump(mode="json") for entry in entries]}

    async def replicas(self, request: Request) -> dict[str, Any]:
        """What every engine replica holds."""
        self._enter(request)
        statuses = await self._fleet.statuses()
        return {
            "replicas": {
                replica: {
                    "resident": list(status.resident),
                    "generations": dict(status.generations),
                    "loads": status.loads,
                    "load_seconds": status.load_seconds,
                    "evictions": status.evictions,
                }
                for replica, status in statuses.items()
            }
        }
