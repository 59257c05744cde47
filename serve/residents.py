"""Which versions a replica holds: each loaded once, kept while it is wanted or in use, dropped by its last use.

Pure asyncio; what loading and unloading mean is told from outside.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from serve.errors import VersionRefusedError
from serve.versions import VersionId

REFUSED_S = 30.0
"""How long a refusal is remembered: nobody makes a replica download and verify a bad version again and again."""

logger = logging.getLogger("ray.serve")
Held = TypeVar("Held")


@dataclass(slots=True)
class _Resident(Generic[Held]):
    held: Held
    users: int
    used_at: float


class Residents(Generic[Held]):
    """The versions of one replica.

    A version in use is never dropped, nor is a wanted one. Beyond `limit` the others go, the longest unused first; a
    version that is marked as ended goes as soon as its last user has.

    Args:
        load: loads a version and proves it; may raise, then nothing of it may stay.
        unload: frees what a version held.
        limit: versions to keep; more where more are wanted or in use.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        load: Callable[[VersionId], Awaitable[Held]],
        unload: Callable[[VersionId, Held], Awaitable[None]],
        limit: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load, self._unload, self._limit, self._clock = load, unload, limit, clock
        self._residents: dict[VersionId, _Resident[Held]] = {}
        self._loading: dict[VersionId, asyncio.Task[None]] = {}
        self._leaving: dict[VersionId, asyncio.Task[None]] = {}
        self._refused: dict[VersionId, tuple[float, str]] = {}
        self._wanted: frozenset[VersionId] = frozenset()
        self._ended: frozenset[VersionId] = frozenset()
        self.loads = self.evictions = 0
        self.load_seconds = 0.0

    @property
    def versions(self) -> tuple[VersionId, ...]:
        """What is held now, in order."""
        return tuple(sorted(self._residents))

    @asynccontextmanager
    async def use(self, version: VersionId) -> AsyncIterator[Held]:
        """Holds a version for as long as the block runs; loads it first if need be.

        Raises:
            VersionRefusedError: the version is unfit, now or a moment ago.
            RaysftError: whatever else loading raises.
        """
        resident = await self._resident(version)
        resident.users += 1
        try:
            yield resident.held
        finally:
            resident.users -= 1
            resident.used_at = self._clock()
            self._trim()

    async def hold(self, versions: Collection[VersionId]) -> dict[VersionId, str]:
        """Loads versions side by side; returns those that are unfit, each with one line why.

        Raises:
            RaysftError: whatever else loading raises, such as an unreadable registry.
        """

        async def one(version: VersionId) -> str | None:
            try:
                await self._resident(version)
            except VersionRefusedError as error:
                return str(error)
            return None

        ordered = sorted(versions)
        told = await asyncio.gather(*map(one, ordered))
        return {version: fault for version, fault in zip(ordered, told, strict=True) if fault}

    async def want(self, wanted: Collection[VersionId], ended: Collection[VersionId] = ()) -> dict[VersionId, str]:
        """Says what is to be held from now on and what is over; loads the wanted, returns the unfit as `hold` does."""
        self._wanted, self._ended = frozenset(wanted), frozenset(ended) - frozenset(wanted)
        refused = await self.hold(self._wanted)
        self._trim()
        return refused

    async def _resident(self, version: VersionId) -> _Resident[Held]:
        while True:
            if version in self._leaving:
                await asyncio.wait({self._leaving[version]})
                continue
            resident = self._residents.get(version)
            if resident is not None:
                resident.used_at = self._clock()
                return resident
            at, fault = self._refused.get(version, (float("-inf"), ""))
            if self._clock() - at < REFUSED_S:
                raise VersionRefusedError(fault)
            loading = self._loading.get(version)
            if loading is None:
                loading = self._loading[version] = asyncio.create_task(self._bring(version))
                loading.add_done_callback(lambda _: self._loading.pop(version, None))
            # Shielded: one caller that goes away must not end the loading that others wait for.
            await asyncio.shield(loading)

    async def _bring(self, version: VersionId) -> None:
        begin = self._clock()
        try:
            held = await self._load(version)
        except VersionRefusedError as error:
            self._refused[version] = (self._clock(), str(error))
            raise
        self._refused.pop(version, None)
        self._residents[version] = _Resident(held, 0, self._clock())
        self.loads += 1
        self.load_seconds += self._clock() - begin

    def _trim(self) -> None:
        """Drops what is over, and the longest unused beyond the limit."""
        idle = [
            version
            for version, resident in sorted(self._residents.items(), key=lambda item: item[1].used_at)
            if resident.users == 0 and version not in self._wanted
        ]
        ended = [version for version in idle if version in self._ended]
        others = [version for version in idle if version not in self._ended]
        surplus = len(self._residents) - len(ended) - self._limit
        for version in (*ended, *others[: max(surplus, 0)]):
            # A task of its own: whoever ends a request last may be cancelled, and must not leave half a version behind.
            self._leaving[version] = asyncio.create_task(self._drop(version, self._residents.pop(version).held))

    async def _drop(self, version: VersionId, held: Held) -> None:
        try:
            await self._unload(version, held)
            self.evictions += 1
        except Exception:
            logger.exception("%s could not be unloaded", version)
        finally:
            del self._leaving[version]
