"""The engine replicas behind a gateway as a whole: what they hold, and asking them to hold more."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ray.serve.handle import DeploymentHandle

from serve.errors import NotReadyError
from serve.versions import VersionId


@dataclass(frozen=True, slots=True)
class Prepared:
    """What replicas said when they were asked to hold versions."""

    replicas: int
    refused: Mapping[VersionId, str]
    """Version -> one line why some replica refuses it."""
    seconds: float


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What one replica holds, and what it did since it started."""

    resident: tuple[str, ...]
    """The versions that it holds."""
    generations: Mapping[str, int]
    """Alias -> number of the alias's entry whose versions it holds."""
    loads: int
    load_seconds: float
    evictions: int


class Fleet(Protocol):
    """What a gateway needs of the replicas as a whole."""

    async def prepare(self, versions: Collection[VersionId]) -> Prepared:
        """Loads and proves versions on every live replica.

        Raises:
            NotReadyError: no replica answers.
        """
        ...

    async def statuses(self) -> Mapping[str, ReplicaStatus]:
        """Replica -> what it holds.

        Raises:
            NotReadyError: no replica answers.
        """
        ...


class ServeFleet:
    """The engine replicas of a Serve deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def prepare(self, versions: Collection[VersionId]) -> Prepared:  # noqa: ARG002
        """See `Fleet`."""
        raise NotReadyError("the replicas cannot be asked to hold versions yet")

    async def statuses(self) -> Mapping[str, ReplicaStatus]:
        """See `Fleet`."""
        raise NotReadyError("the replicas cannot be asked what they hold yet")
