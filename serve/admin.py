"""The routes under /admin: what the registry holds, and where its aliases point. They need the scope admin."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from starlette.requests import Request

from serve.access_log import AccessLog, Record
from serve.body import read_bytes
from serve.door import NOBODY
from serve.errors import BadRequestError, UnknownModelError
from serve.front import record_of
from serve.keys import Key
from serve.registry import Registry
from serve.requests import read_object
from serve.versions import AliasEntry, Version, VersionId

BODY_BYTES = 64 * 2**10
BODY_S = 10.0

Enter = Callable[[Request], Key]
"""Lets a request with the scope admin in, or raises."""


class Admin:
    """The routes.

    Args:
        open_registry: opens the registry; each request does, and never on the event loop.
        enter: lets requests in.
        log: takes a line of everything that is changed.
    """

    def __init__(self, open_registry: Callable[[], Registry], enter: Enter, log: AccessLog) -> None:
        self._open, self._enter, self._log = open_registry, enter, log

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Method, path and handler of each."""
        return [
            ("GET", "/admin/versions", self.versions),
            ("GET", "/admin/versions/{version}", self.version),
            ("GET", "/admin/aliases", self.aliases),
            ("GET", "/admin/aliases/{alias}/history", self.history),
            ("POST", "/admin/aliases/{alias}/promote", self.promote),
            ("POST", "/admin/aliases/{alias}/rollback", self.rollback),
        ]

    async def versions(self, request: Request) -> dict[str, Any]:
        """All versions, and the aliases that point at each."""
        self._enter(request)

        def read() -> dict[str, Any]:
            registry = self._open()
            pointing: dict[VersionId, list[str]] = {}
            for alias, entry in registry.aliases().items():
                pointing.setdefault(entry.version, []).append(alias)
            versions = [version for name in registry.names() for version in registry.versions(name)]
            return {"versions": [{**_summary(v), "aliases": pointing.get(v.id, [])} for v in versions]}

        return await asyncio.to_thread(read)

    async def version(self, request: Request, version: str) -> dict[str, Any]:
        """One version with its lineage, whole."""
        self._enter(request)

        def read() -> dict[str, Any]:
            found = self._open().get(VersionId.parse(version))
            bundle = found.bundle
            return {
                **_summary(found),
                "target_modules": list(bundle.target_modules),
                "base_fingerprint": bundle.base_fingerprint,
                "template_fingerprint": bundle.template_fingerprint,
                "files": {name: file.size for name, file in bundle.files.items()},
                "lineage": bundle.lineage,
            }

        return await asyncio.to_thread(read)

    async def aliases(self, request: Request) -> dict[str, Any]:
        """Where every alias points, by its newest entry."""
        self._enter(request)
        entries = await asyncio.to_thread(lambda: self._open().aliases())
        return {"aliases": {alias: _plain(entry) for alias, entry in entries.items()}}

    async def history(self, request: Request, alias: str) -> dict[str, Any]:
        """All moves of an alias, oldest first."""
        self._enter(request)
        entries = await asyncio.to_thread(lambda: self._open().history(alias))
        if not entries:
            raise UnknownModelError(f"there is no alias {alias}")
        return {"history": [_plain(entry) for entry in entries]}

    async def promote(self, request: Request, alias: str) -> dict[str, Any]:
        """Points an alias at the body's `version`."""
        key = self._enter(request)
        fields = await _fields(request, required=("version",), optional=("reason",))
        version = VersionId.parse(fields["version"])

        def move(registry: Registry) -> AliasEntry:
            return registry.promote(alias, version, by=_who(key), reason=fields["reason"])

        return await self._move("promote", alias, record_of(request.scope), move)

    async def rollback(self, request: Request, alias: str) -> dict[str, Any]:
        """Points an alias back at the version that it served before."""
        key = self._enter(request)
        fields = await _fields(request, optional=("reason",))

        def move(registry: Registry) -> AliasEntry:
            return registry.rollback(alias, by=_who(key), reason=fields["reason"])

        return await self._move("rollback", alias, record_of(request.scope), move)

    async def _move(
        self, action: str, alias: str, record: Record, move: Callable[[Registry], AliasEntry]
    ) -> dict[str, Any]:
        def run() -> tuple[AliasEntry, bool]:
            registry = self._open()
            before = registry.alias(alias)
            entry = move(registry)
            return entry, before is None or before.number != entry.number

        entry, moved = await asyncio.to_thread(run)
        self._log.audit(action, record, moved=moved, entry=_plain(entry))
        return {"moved": moved, "entry": _plain(entry)}


async def _fields(
    request: Request, *, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()
) -> dict[str, str]:
    """Reads a body of texts; a missing optional one is empty."""
    body = read_object(await read_bytes(request, BODY_BYTES, BODY_S, strict=True))
    for field in body:
        if field not in (*required, *optional):
            known = ", ".join((*required, *optional))
            raise BadRequestError(f"{field[:40]}: no such field in this request; it takes {known}", field[:40])
    for field in (*required, *optional):
        if not isinstance(body.get(field, None if field in required else ""), str):
            raise BadRequestError(f"{field}: must be a text", field)
    return {field: body.get(field, "") for field in (*required, *optional)}


def _who(key: Key) -> str | None:
    """Whom the registry's history names; without keys the gateway's own user, as on its command line."""
    return None if key is NOBODY else f"key {key.id}"


def _plain(entry: AliasEntry) -> dict[str, Any]:
    return entry.model_dump(mode="json")


def _summary(version: Version) -> dict[str, Any]:
    data = version.model_dump(mode="json", exclude={"bundle"})
    return {**data, "base_model": version.bundle.base_model, "rank": version.bundle.rank}
