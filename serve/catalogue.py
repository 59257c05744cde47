"""What a gateway knows of the registry: re-read at most about once a second, and never on the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from types import MappingProxyType

from serve.errors import UnknownModelError
from serve.registry import Registry
from serve.traffic import Known, Target, resolve
from serve.versions import Version
from sft.errors import AdapterError, StorageError

MAX_AGE_S = 1.0
PAUSE_S = 0.1
"""Not even unknown names make the registry be read again sooner than this after the last read."""

logger = logging.getLogger("ray.serve")


class Catalogue:
    """The versions and aliases of a registry, as they were at most `MAX_AGE_S` ago.

    Args:
        base_id: the base model's id.
        open_registry: opens the registry; called at the first read, and again after a failure to open it.
        clock: seconds, ever growing.
    """

    def __init__(
        self, base_id: str, open_registry: Callable[[], Registry], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._open, self._clock = open_registry, clock
        self._registry: Registry | None = None
        self._known = Known(base_id)
        self._read_at = float("-inf")
        self._reading = asyncio.Lock()

    async def target(self, model: str) -> Target:
        """Finds what answers a request's `model`; an unknown name is looked up in the registry at once.

        Raises:
            UnknownModelError: there is no such model.
            RegistryError: the registry was never readable.
        """
        asked_at = self._clock()
        try:
            return resolve(model, await self.known())
        except UnknownModelError:
            await self._read_since(asked_at)
            return resolve(model, self._known)

    async def known(self) -> Known:
        """A view that is at most `MAX_AGE_S` old; an older one while the registry cannot be read.

        Raises:
            RegistryError: the registry was never readable.
        """
        await self._read_since(self._clock() - MAX_AGE_S)
        return self._known

    async def _read_since(self, moment: float) -> None:
        """Reads the registry unless the last read began after that moment. Those who wait share one read."""
        if self._read_at >= moment:
            return
        async with self._reading:
            if self._read_at >= moment:
                return
            began = self._clock()
            if began - self._read_at < PAUSE_S:
                await asyncio.sleep(PAUSE_S)
                began = self._clock()
            try:
                self._known = await asyncio.to_thread(self._read, self._known.base_id)
            except StorageError as error:
                if self._read_at == float("-inf"):
                    raise
                logger.warning("the registry's last known state stays in force: %s", error)
            self._read_at = began

    async def versions(self) -> list[Version]:
        """The manifests of all versions, damaged ones left out."""
        known = await self.known()

        def read() -> list[Version]:
            found = []
            for version in sorted(known.versions):
                try:
                    found.append(self._opened().get(version))
                except AdapterError as error:
                    logger.warning("left out of the list of models: %s", error)
            return found

        return await asyncio.to_thread(read)

    def _read(self, base_id: str) -> Known:
        registry = self._opened()
        # Aliases first: a version that an alias names is then surely among the versions read after it.
        aliases = {alias: entry.version for alias, entry in registry.aliases().items()}
        return Known(base_id, frozenset(registry.version_ids()), MappingProxyType(aliases))

    def _opened(self) -> Registry:
        if self._registry is None:
            self._registry = self._open()
        return self._registry
