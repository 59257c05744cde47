"""What a replica knows of the registry: asked for at most about once a second, and never on the event loop.

A gateway follows an alias to another version only when every engine replica holds it; until then the state before stays
in force, and it stays where a replica refuses the version.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType

from serve.errors import NotReadyError, RegistryError, RetiredModelError, UnknownModelError
from serve.registry import Contents, Registry
from serve.traffic import Choice, Known, Target, choose
from serve.versions import AliasEntry, Version, VersionId
from sft.errors import AdapterError, StorageError

MAX_AGE_S = 1.0
"""No answer rests on an older view, as long as the registry can be read. At half of it the next read begins, so that
under steady load nobody waits for one."""
PAUSE_S = 0.1
"""Not even unknown names make the registry be asked again sooner than this after the last time."""
PATIENCE_S = 0.5
"""How long a request waits for a slow registry before it goes on with the last known state."""
FIRST_S = 30.0
"""How long a request waits for the first state of all."""
LIST_EVERY_S = 30.0
"""The registry is listed anew where its token changed; and this often without, should a writer have died before it."""
REMIND_S = 60.0
AGAIN_S = 1.0
"""How long to wait before replicas that could not load anything are asked again."""

Prepare = Callable[[frozenset[VersionId]], Awaitable[Mapping[VersionId, str]]]
"""Has every engine replica hold versions; returns the unfit with one line why, or raises `NotReadyError`."""

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class _Move:
    """An alias's newest entry, and the versions that a rollback of it brings back."""

    entry: AliasEntry
    before: frozenset[VersionId]


class Catalogue:
    """The versions and aliases of a registry, as they were at most `MAX_AGE_S` ago.

    It never goes back: a version that was seen stays, and an alias only follows entries of higher numbers. While the
    registry cannot be read, or is slow, the last known state stays in force, and `stale_since` says since when.
    `held_back` has the aliases whose newest entry is not followed because a version of it is unfit, and why.

    Args:
        base_id: the base model's id.
        open_registry: opens the registry; called at the first read, and again after a failure to open it.
        prepare: has the engine replicas hold what an alias is to serve; None where nobody needs to.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        base_id: str,
        open_registry: Callable[[], Registry],
        prepare: Prepare | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._open, self._prepare, self._clock = open_registry, prepare, clock
        self._registry: Registry | None = None
        self._known = Known(base_id)
        self._moves: dict[str, _Move] = {}
        self._pending: dict[str, _Move] = {}
        self._flips: dict[str, asyncio.Task[None]] = {}
        self.held_back: dict[str, str] = {}
        self._token: bytes | None = None
        self._listed_at = self._tried_at = float("-inf")
        self._read_at: datetime | None = None
        self._fault: StorageError | None = None
        self._said_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._started = float("-inf")

    async def choose(self, model: str, session: str | None = None) -> Choice:
        """Finds what a request's `model` goes to; an unknown name is looked up in the registry at once.

        Args:
            model: the request's `model`.
            session: who asks, for canaries and shadows; None draws anew for this request.

        Raises:
            RetiredModelError: the version named was retired.
            UnknownModelError: there is no such model.
            RegistryError: the registry was never readable.
        """
        session = session or secrets.token_hex(16)
        asked_at = self._clock()
        try:
            return choose(model, await self.known(), session)
        except RetiredModelError:
            raise
        except UnknownModelError:
            await self._read_since(asked_at)
            return choose(model, self._known, session)

    async def target(self, model: str, session: str | None = None) -> Target:
        """What answers a request, without a shadow; see `choose`."""
        return (await self.choose(model, session)).target

    async def known(self) -> Known:
        """A view that is at most `MAX_AGE_S` old; an older one while the registry cannot be read.

        Raises:
            RegistryError: the registry was never readable.
        """
        now = self._clock()
        if self._reading is None and self._tried_at < now - MAX_AGE_S / 2:
            self._start()
        await self._read_since(now - MAX_AGE_S)
        return self._known

    async def refresh(self) -> None:
        """Reads the registry now, and follows it as far as the replicas hold what it names already.

        Raises:
            RegistryError: the registry was never readable.
        """
        await self._read_since(self._clock(), hurry=True)
        if self._flips:
            await asyncio.wait(self._flips.values(), timeout=PATIENCE_S)

    def generations(self) -> Mapping[str, tuple[int, frozenset[VersionId]]]:
        """The number of each alias's entry in force, and the versions that it names."""
        return {alias: (move.entry.number, frozenset(move.entry.parts())) for alias, move in self._moves.items()}

    def entries(self) -> Mapping[str, AliasEntry]:
        """The entry of each alias that is in force."""
        return {alias: move.entry for alias, move in self._moves.items()}

    async def versions(self) -> list[Version]:
        """The manifests of all versions that can be asked for, damaged ones left out."""
        known = await self.known()
        wanted = sorted(known.versions - (known.retired - known.wanted()))

        def read() -> list[Version]:
            registry = self._opened()
            registry.preload(wanted)
            found = []
            for version in wanted:
                try:
                    found.append(registry.get(version))
                except AdapterError as error:
                    logger.warning("left out of the list of models: %s", error)
            return found

        return await asyncio.to_thread(read)

    @property
    def stale_since(self) -> datetime | None:
        """When the state in force was read, while no newer one can be had; None while all is well."""
        slow = self._reading is not None and self._clock() - self._started > MAX_AGE_S
        return self._read_at if self._fault or slow else None

    async def _read_since(self, moment: float, *, hurry: bool = False) -> None:
        """Waits for a read that began after that moment. All who wait share one."""
        while self._tried_at < moment or self._read_at is None:
            reading = self._reading or self._start(hurry=hurry)
            patience = FIRST_S if self._read_at is None else PATIENCE_S
            done, _ = await asyncio.wait({reading}, timeout=max(self._started + patience - self._clock(), 0))
            if done:
                reading.result()
            if self._read_at is None:
                raise RegistryError(str(self._fault or f"the registry did not answer within {FIRST_S:.0f} s"))
            if not done:
                break

    def _start(self, *, hurry: bool = False) -> asyncio.Task[None]:
        pause = 0.0 if hurry else self._tried_at + PAUSE_S - self._clock()
        self._started = self._clock() + max(pause, 0)
        self._reading = asyncio.create_task(self._read(pause))
        return self._reading

    async def _read(self, pause: float) -> None:
        try:
            if pause > 0:
                await asyncio.sleep(pause)
            began = self._clock()
            try:
                contents = await asyncio.to_thread(self._look, began)
            except StorageError as error:
                self._complain(error)
            else:
                if contents is not None:
                    self._adopt(contents)
                self._read_at = datetime.now(UTC)
                if self._fault:
                    logger.info("the registry can be read again")
                self._fault = None
            self._tried_at = began
        finally:
            self._reading = None

    def _look(self, now: float) -> Contents | None:
        """Reads the registry, in a thread; None where nothing changed since the last time."""
        registry = self._opened()
        # The token first: what changes after it will show as another token at the next look.
        token = registry.changed()
        if token is not None and token == self._token and now - self._listed_at < LIST_EVERY_S:
            return None
        contents = registry.contents()
        self._token, self._listed_at = token, now
        return contents

    def _adopt(self, contents: Contents) -> None:
        known = self._known
        self._known = dataclasses.replace(
            known, versions=known.versions | contents.versions, retired=known.retired | contents.retired
        )
        for alias, entry in contents.aliases.items():
            now = self._pending.get(alias) or self._moves.get(alias)
            if now and entry.number < now.entry.number:
                logger.warning("%s went back to entry %s in the registry; not followed", alias, entry.number)
                continue
            before = contents.previous.get(alias)
            move = _Move(entry, frozenset(before.parts()) if before else frozenset())
            # At the first look there is nothing to stay with; and replicas start with what is wanted.
            if self._prepare is None or self._read_at is None or known.kept().issuperset(entry.parts()):
                self._take(alias, move)
            elif now is None or entry.number > now.entry.number:
                self._pending[alias] = move
                if alias not in self._flips:
                    self._flips[alias] = flip = asyncio.create_task(self._flip(alias, self._prepare))
                    flip.add_done_callback(lambda _, alias=alias: self._flips.pop(alias))  # type: ignore[misc]
        self._publish()

    async def _flip(self, alias: str, prepare: Prepare) -> None:
        """Follows an alias's newest entry once all replicas hold what it names."""
        while alias in self._pending:
            move = self._pending[alias]
            try:
                refused = await prepare(frozenset(move.entry.parts()))
            except NotReadyError as error:
                logger.warning("%s does not move yet: %s", alias, error)
                await asyncio.sleep(AGAIN_S)
                continue
            if self._pending.get(alias) is not move:
                continue
            if refused:
                del self._pending[alias]
                self.held_back[alias] = fault = next(iter(refused.values()))
                logger.error("%s stays where it is; entry %s is not followed: %s", alias, move.entry.number, fault)
            else:
                self._take(alias, move)
                self._publish()

    def _take(self, alias: str, move: _Move) -> None:
        self._moves[alias] = move
        self._pending.pop(alias, None)
        self.held_back.pop(alias, None)

    def _publish(self) -> None:
        """Puts the aliases' state in force, all at once."""
        moves = sorted(self._moves.items())
        entries = [(alias, move.entry) for alias, move in moves]
        self._known = dataclasses.replace(
            self._known,
            aliases=MappingProxyType({alias: entry.version for alias, entry in entries}),
            canaries=MappingProxyType({alias: entry.canary for alias, entry in entries if entry.canary}),
            shadows=MappingProxyType({alias: entry.shadow for alias, entry in entries if entry.shadow}),
            previous=MappingProxyType({alias: move.before for alias, move in moves if move.before}),
        )

    def _complain(self, error: StorageError) -> None:
        now = self._clock()
        if self._fault is None or now - self._said_at >= REMIND_S:
            self._said_at = now
            kept = f", so its state of {self._read_at:%Y-%m-%d %H:%M:%SZ} stays in force" if self._read_at else ""
            logger.warning("the registry cannot be read%s: %s", kept, error)
        self._fault = error

    def _opened(self) -> Registry:
        if self._registry is None:
            self._registry = self._open()
        return self._registry
