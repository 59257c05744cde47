"""The engine replicas as a whole: which versions they hold, and how all of them come to hold one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.errors import Failure, NotReadyError
from serve.versions import VersionId

PREPARE_S = 330.0
"""Longest time for all replicas to hold a version: above a download's own limit."""
STATUS_S = 5.0


@dataclass(frozen=True, slots=True)
class Holding:
    """What one replica says when it was asked to hold versions.

    Rule: `refused` has each unfit version with one line why; `failure` says why nothing could be loaded now.
    """

    refused: Mapping[VersionId, str]
    failure: Failure | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What all replicas said. Rule: `refused` has a version that any replica refuses, with one line why."""

    replicas: int
    refused: Mapping[VersionId, str]
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What a replica holds and has done.

    Rule: `generations` has, for each alias, the number of its entry whose versions the replica holds; `loads`,
    `load_seconds` and `evictions` are totals since its start.
    """

    resident: tuple[str, ...] = ()
    generations: Mapping[str, int] = field(default_factory=dict)
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0


class Fleet(Protocol):
    """What a gateway needs of all engine replicas together."""

    async def prepare(self, versions: Collection[VersionId]) -> Prepared:
        """Has every live replica load and prove versions.

        Raises:
            NotReadyError: no replica answers, or one cannot load anything now.
        """
        ...

    async def statuses(self) -> Mapping[str, ReplicaStatus]:
        """Every live replica's status by its name; those that do not answer in time are left out."""
        ...


class ServeFleet:
    """The replicas of a Serve deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle: Any = handle

    async def prepare(self, versions: Collection[VersionId]) -> Prepared:
        """See `Fleet`."""
        begin = time.monotonic()
        told: Mapping[str, Holding] = await self._ask("hold", PREPARE_S, tuple(versions))
        for holding in told.values():
            if holding.failure:
                raise NotReadyError(holding.failure.message)
        refused = {version: fault for holding in told.values() for version, fault in holding.refused.items()}
        return Prepared(len(told), refused, time.monotonic() - begin)

    async def statuses(self) -> Mapping[str, ReplicaStatus]:
        """See `Fleet`."""
        try:
            return await self._ask("status", STATUS_S)
        except NotReadyError:
            return {}

    async def _ask(self, method: str, seconds: float, *arguments: Any) -> Mapping[str, Any]:
        """What each live replica says; one that dies meanwhile is none, and its successor starts with what is wanted.

        Raises:
            NotReadyError: none answers, or one that lives does not answer in time.
        """
        try:
            async with asyncio.timeout(seconds):
                answers = await self._handle.broadcast(method, *arguments).results_async(return_exceptions=True)
        except TimeoutError:
            raise NotReadyError(f"not every engine replica answered within {seconds:g} s") from None
        except (RayError, RayServeException) as error:
            raise NotReadyError("no engine replica answers") from error
        told = dict(answer for answer in answers if not isinstance(answer, BaseException))
        if not told:
            raise NotReadyError("no engine replica answers")
        return told
