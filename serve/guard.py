"""Watches what new versions do for clients, and takes a version back that breaks a limit.

On the way of a request it only counts. Each gateway counts its own part; where there are several they add up what they
counted, and each decides by the sum. The move itself is the registry's ordinary one, from the very entry that was
judged: so of two gateways that find the same, one moves the alias, and nobody who moved it meanwhile is undone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from serve.access_log import Record
from serve.catalogue import Catalogue
from serve.config import GuardSection
from serve.errors import ConflictError, RegistryError
from serve.guard_counts import Counts, Tally
from serve.guard_rules import Breach, Watch, checkers_of, judge, watch_of
from serve.items import spoken
from serve.metrics import Metrics
from serve.question import Question
from serve.registry import Registry
from serve.shadow import Witness
from serve.versions import AliasEntry, VersionId
from sft.errors import RaysftError

BY = "guard"
"""Who moved, in the alias's history."""
WAITING = 64
"""Answers that wait to be checked; beyond them a sampled answer is not checked, but counted."""
FAULTS = frozenset({"internal_error", "not_ready", "timeout", "model_refused"})
"""Errors that a version, or its server, is to blame for; a request with another error is not counted at all."""
PARTS = ("stable", "canary")

Seen = Mapping[Watch, tuple[Counts, Counts]]
"""For each watch what was counted of its version, and of the version that it is compared with."""
Peers = Callable[[], Awaitable[Iterable[Seen]]]
"""What all gateways have seen, this one among them."""

logger = logging.getLogger("ray.serve")


class Guard:
    """The guard of one gateway.

    Args:
        config: the limits.
        catalogue: which entries are in force.
        open_registry: opens the registry, for a rollback.
        metrics: takes the counts of rollbacks.
        clock: seconds, ever growing.
    """

    def __init__(
        self,
        config: GuardSection,
        catalogue: Catalogue,
        open_registry: Callable[[], Registry],
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._catalogue, self._open, self._metrics = config, catalogue, open_registry, metrics
        self._clock, self._active = clock, config.active
        self._checkers: dict[str, Any] = {name: check.checker() for name, check in config.checkers.items()}
        self._tallies: dict[tuple[str, VersionId], Tally] = {}
        self._watches: dict[Watch, Counts] = {}
        self._given_up: set[Watch] = set()
        self._rotated_at = clock()
        self._waiting: asyncio.Queue[tuple[str, VersionId, str]] = asyncio.Queue(WAITING)
        self._tasks: list[asyncio.Task[None]] = []

    def listen(self, question: Question) -> Witness | None:
        """Whom to tell the answer to a request, where it was drawn to be checked."""
        if not self._checkers or not _counted(question) or random.random() >= self._config.sample:
            return None
        return Witness(keeps=True) if checkers_of(self._config, question.body["model"]) else None

    def saw(self, question: Question, record: Record, witness: Witness | None) -> None:
        """Counts a request to an alias that has ended.

        Args:
            question: the request.
            record: what became known of it.
            witness: who heard the answer, where somebody did.
        """
        alias, version = question.body["model"], question.choice.target.version
        if not self._active or not _counted(question) or version is None:
            return
        if record.error and record.error not in FAULTS:
            return
        tally = self._tallies.get((alias, version))
        if tally is None:
            tally = self._tallies[alias, version] = Tally()
        if record.error:
            tally.failed()
            return
        tally.answered(record.first_token_s, record.total_s)
        if witness:
            try:
                self._waiting.put_nowait((alias, version, "".join(witness.texts)))
            except asyncio.QueueFull:
                self._metrics.unchecked(alias)

    def start(self, peers: Peers | None = None) -> None:
        """Begins to check answers and to look at the limits.

        Args:
            peers: asks all gateways, where there are several.
        """
        if self._active:
            self._tasks = [asyncio.create_task(self._check()), asyncio.create_task(self._look_on(peers))]

    async def close(self) -> None:
        """Ends that."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def seen(self) -> Seen:
        """What this gateway counted for each of its watches."""
        return {watch: (self._counts(watch.alias, watch.version), self._before(watch)) for watch in self._watches}

    async def look(self, peers: Peers | None = None) -> None:
        """Looks at what is on probation, and takes back what breaks a limit.

        Raises:
            RegistryError: the registry was never readable.
        """
        await self._catalogue.known()
        entries = self._catalogue.entries()
        self._follow(entries)
        if not self._watches:
            return
        seen = _added(await peers()) if peers else self.seen()
        for watch in [*self._watches]:
            breach = judge(self._config, watch, *seen.get(watch, (Counts(), Counts())))
            if breach and watch not in self._given_up:
                await self._take_back(watch, entries[watch.alias], breach)

    def _follow(self, entries: Mapping[str, AliasEntry]) -> None:
        """Opens and closes watches as the entries in force have it, and forgets what nobody asks for."""
        now, watch_s = datetime.now(UTC), self._config.watch_s
        found = {watch for entry in entries.values() if (watch := watch_of(entry, now, watch_s))}
        for watch in found - self._watches.keys():
            # What it did before, such as at an earlier promotion, does not count.
            self._tallies.pop((watch.alias, watch.version), None)
            self._watches[watch] = self._counts(watch.alias, watch.before)
        self._watches = {watch: before for watch, before in self._watches.items() if watch in found}
        self._given_up &= found
        if self._clock() - self._rotated_at >= watch_s:
            self._rotated_at = self._clock()
            for tally in self._tallies.values():
                tally.rotate()
        served = {(alias, version) for alias, entry in entries.items() for version in entry.parts()}
        self._tallies = {place: tally for place, tally in self._tallies.items() if place in served}

    async def _take_back(self, watch: Watch, entry: AliasEntry, breach: Breach) -> None:
        """Ends a canary, or rolls a promotion back, unless someone moved the alias since."""
        alias, reason = watch.alias, f"{watch.version}: {breach.text}"

        def move() -> AliasEntry:
            registry = self._open()
            if watch.canary:
                return registry.canary(alias, watch.version, 0, by=BY, reason=reason, expected=entry.number)
            return registry.rollback(alias, by=BY, reason=reason, expected=entry.number, banned=watch.version)

        try:
            moved = await asyncio.to_thread(move)
        except ConflictError:
            logger.info("%s was moved before the guard could, which found: %s", alias, reason)
        except RegistryError as error:
            logger.error("the guard cannot take %s back from %s now: %s", watch.version, alias, error)
        except RaysftError as error:
            self._given_up.add(watch)
            logger.error("the guard found: %s; but it cannot take the version back: %s", reason, error)
        else:
            self._metrics.guarded(alias, breach.kind)
            logger.warning("the guard took a version back, %s serves %s; %s", alias, moved.version, reason)
        with suppress(RegistryError):
            await self._catalogue.refresh()

    async def _look_on(self, peers: Peers | None) -> None:
        while True:
            await asyncio.sleep(self._config.check_s)
            try:
                await self.look(peers)
            except RegistryError as error:
                logger.warning("the guard cannot look: %s", error)
            except Exception:
                logger.exception("the guard failed to look")

    async def _check(self) -> None:
        """Scores the answers that wait, one after the other, on a thread: a pattern may take its time."""
        while True:
            alias, version, text = await self._waiting.get()
            try:
                scores = await asyncio.to_thread(self._scores, checkers_of(self._config, alias), text)
            except Exception as error:  # never the text, which a traceback may quote
                logger.error("an answer of %s could not be checked (%s)", version, type(error).__name__)
                continue
            tally = self._tallies.get((alias, version))
            if tally:
                for name, score in scores:
                    tally.checked(name, score)

    def _scores(self, names: Iterable[str], text: str) -> list[tuple[str, float]]:
        """The scores of an answer's choices; a choice that calls tools says nothing to check."""
        from evals.answer import split
        from evals.errors import CheckError

        found = []
        said = [choice for choice in spoken(text) if not choice.get("tool_calls")]
        for answer in [split(choice["text"], choice.get("reasoning", "")) for choice in said]:
            for name in names:
                with suppress(CheckError):
                    found.append((name, self._checkers[name].check(answer, None).value))
        return found

    def _counts(self, alias: str, version: VersionId) -> Counts:
        tally = self._tallies.get((alias, version))
        return tally.counts() if tally else Counts()

    def _before(self, watch: Watch) -> Counts:
        """Of a canary's stable version as it does now; of a replaced one as it did then."""
        return self._counts(watch.alias, watch.before) if watch.canary else self._watches[watch]


def _counted(question: Question) -> bool:
    """Whether a request is to an alias, by a client, for an answer."""
    return question.choice.part in PARTS and question.route != "tokenize"


def _added(all_seen: Iterable[Seen]) -> Seen:
    found: dict[Watch, tuple[Counts, Counts]] = {}
    for seen in all_seen:
        for watch, (counts, before) in seen.items():
            mine = found.get(watch, (Counts(), Counts()))
            found[watch] = (mine[0].plus(counts), mine[1].plus(before))
    return found
