from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.types import Message

from serve import guard
from serve.catalogue import Catalogue
from serve.config import ServeConfig
from serve.errors import Failure
from serve.gateway import Gateway
from serve.guard import Guard, Peers
from serve.items import DONE, Final
from serve.keys import KeySource
from serve.registry import Registry
from serve.traffic import Target
from serve.versions import AliasEntry, VersionId
from tests.serve.served import until
from tests.serve.stand_in import CHAT, USAGE, Part, StandIn, StandInFleet, client_of

pytestmark = pytest.mark.anyio

V1, V2 = VersionId("support", 1), VersionId("support", 2)
BROKEN = Failure(500, "broken", "server_error", None, "internal_error")
ERRORS: dict[str, Any] = {"error_rate": {"at_most": 0.2}}
JSON: dict[str, Any] = {"checkers": {"json": {"check": {"kind": "json"}, "at_least": 0.9}}, "sample": 1}


class Speaker(StandIn):
    """Answers with a JSON object, but for versions that are told to do something else."""

    def __init__(self) -> None:
        super().__init__()
        self.words: dict[VersionId | None, str | Failure] = {}

    def own_items(self, target: Target) -> Sequence[Part]:
        word = self.words.get(target.version, '{"fine": true}')
        if isinstance(word, Failure):
            return [word]
        delta = {"choices": [{"index": 0, "delta": {"content": word}}]}
        whole = {"choices": [{"index": 0, "message": {"content": word}}]}
        if self.asked[-1][1].get("stream"):
            return [f"data: {json.dumps(delta)}\n\n", Final(DONE, USAGE)]
        return [Final(json.dumps(whole), USAGE)]


@dataclass
class Site:
    """A gateway whose guard looks when it is told to."""

    gateway: Gateway
    client: httpx.AsyncClient
    registry: Registry
    engine: Speaker

    @property
    def guard(self) -> Guard:
        return self.gateway.guard

    @property
    def newest(self) -> AliasEntry:
        found = Registry.open(self.registry.address).alias("support")
        assert found
        return found

    async def ask(self, count: int = 10, **fields: Any) -> None:
        for _ in range(count):
            await self.client.post("/v1/chat/completions", json={**CHAT, **fields})

    async def checked(self, version: VersionId = V2, count: int = 10) -> None:
        """Waits until so many answers were scored."""

        def done() -> bool:
            found = [tally for place, tally in self.guard._tallies.items() if place[1] == version]
            return sum(tally.counts().checks.get("json", (0, 0))[0] for tally in found) >= count

        await until(done)

    async def follow(self, peers: Peers | None = None) -> None:
        """Has the gateway know what the registry holds, and its guard look."""
        await self.gateway._catalogue.refresh()
        await self.guard.look(peers)


@pytest.fixture
async def made(registry: Registry) -> AsyncIterator[Callable[..., Site]]:
    """Makes gateways on one registry and engine."""
    engine, sites = Speaker(), []

    def make(**limits: Any) -> Site:
        values = {"registry": "r", "base": "base", "guard": {"min_requests": 10, "check_s": 1000, **limits}}
        config = ServeConfig.model_validate(values)

        def opened() -> Registry:
            return Registry.open(registry.address)

        catalogue = Catalogue(config.id, opened)
        gateway = Gateway(catalogue, engine, StandInFleet(), opened, config, KeySource(None, ""))
        site = Site(gateway, client_of(gateway.app()), registry, engine)
        gateway.guard.start()
        sites.append(site)
        return site

    yield make
    for site in sites:
        await site.guard.close()
        await site.client.aclose()


async def test_a_promotion_that_fails_clients_is_rolled_back_once(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    await site.ask()
    site.registry.promote("support", V2, by="me")
    await site.follow()
    site.engine.words[V2] = BROKEN
    await site.ask(9)
    await site.guard.look()
    assert site.newest.number == 2
    await site.ask(1)
    await site.guard.look()
    entry = site.newest
    assert (entry.number, entry.version, entry.action, entry.by) == (3, V1, "rollback", "guard")
    assert entry.reason == "support@v2: 10 of 10 requests failed, 1 above 0.2"
    await site.ask(1)
    assert str(site.engine.asked[-1][2]) == "support@v1"
    text = (await site.client.get("/metrics")).text
    assert 'raysft_guard_rollbacks_total{alias="support",reason="error_rate",replica="0"} 1.0' in text
    for _ in range(3):
        await site.follow()
    assert site.newest.number == 3


async def test_what_a_person_promotes_again_is_watched_anew(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    for number in (2, 4):
        site.registry.promote("support", V2, by="me")
        await site.follow()
        site.engine.words = {}
        await site.ask()
        await site.follow()
        assert site.newest.number == number
        site.engine.words[V2] = BROKEN
        await site.ask(20)
        await site.follow()
        assert (site.newest.number, site.newest.action) == (number + 1, "rollback")


async def test_a_canary_that_is_worse_than_the_stable_version_ends(made: Callable[..., Site]) -> None:
    site = made(error_rate={"above_before": 0.5})
    await site.ask(0)
    site.registry.canary("support", V2, 0.5)
    await site.follow()
    site.engine.words[V2] = BROKEN
    for session in range(60):
        await site.ask(1, user=str(session))
    await site.guard.look()
    entry = site.newest
    assert (entry.number, entry.action, entry.version, entry.canary, entry.by) == (3, "canary", V1, None, "guard")
    assert "requests failed, 1 more than 0.5 above the 0 of support@v1" in entry.reason


async def test_a_canary_that_was_promoted_does_not_come_back_as_canary(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    site.registry.canary("support", V2, 0.5)
    site.registry.promote("support", V2)
    await site.follow()
    site.engine.words[V2] = BROKEN
    await site.ask()
    await site.guard.look()
    assert (site.newest.number, site.newest.version, site.newest.canary) == (4, V1, None)


async def test_checkers_score_live_answers_of_both_kinds(made: Callable[..., Site]) -> None:
    site = made(**JSON)
    site.registry.promote("support", V2)
    await site.follow()
    await site.ask(5)
    await site.ask(5, stream=True)
    await site.checked()
    await site.guard.look()
    assert site.newest.number == 2
    site.engine.words[V2] = "Sure! Here is your JSON."
    await site.ask(2, stream=True)
    await site.checked(count=12)
    await site.guard.look()
    assert site.newest.reason == "support@v2: checker json scores 12 answers 0.833 below 0.9"
    assert "Sure" not in json.dumps(site.newest.model_dump(mode="json"))


async def test_answers_that_nobody_can_check_in_time_are_counted(
    made: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "WAITING", 2)
    site = made(**JSON)
    await site.guard.close()
    await site.ask(5)
    assert (
        'raysft_guard_checks_dropped_total{alias="support",replica="0"} 3.0' in (await site.client.get("/metrics")).text
    )


async def test_only_what_a_version_is_to_blame_for_counts(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    await site.follow()
    await site.ask(1)
    await site.ask(1, model="support@v1")
    await site.ask(1, model="base")
    await site.ask(1, messages=[])
    await site.client.post("/tokenize", json=CHAT)
    site.engine.words[V1] = Failure(400, "too long", "invalid_request_error")
    await site.ask(1)
    (tally,) = site.guard._tallies.values()
    assert (tally.counts().requests, tally.counts().failures) == (1, 0)


async def test_without_a_limit_nothing_is_counted(made: Callable[..., Site]) -> None:
    site = made()
    await site.ask(3)
    assert (site.guard._tallies, site.guard._tasks) == ({}, [])


async def test_two_gateways_add_up_and_move_the_alias_once(made: Callable[..., Site]) -> None:
    sites = [made(**ERRORS), made(**ERRORS)]

    async def peers() -> list[guard.Seen]:
        return [site.guard.seen() for site in sites]

    sites[0].registry.promote("support", V2)
    sites[0].engine.words[V2] = BROKEN
    for site in sites:
        await site.follow()
    for site in sites:
        await site.ask(5)
    await sites[0].guard.look()
    assert sites[0].newest.number == 2  # alone it has not seen enough
    await asyncio.gather(*(site.guard.look(peers) for site in sites))
    history = sites[0].registry.history("support")
    assert [(entry.number, entry.action) for entry in history] == [(1, "promote"), (2, "promote"), (3, "rollback")]
    assert history[-1].reason == "support@v2: 10 of 10 requests failed, 1 above 0.2"
    rolled = [(await site.client.get("/metrics")).text.count("raysft_guard_rollbacks_total{") for site in sites]
    assert sorted(rolled) == [0, 1]


async def test_who_moved_the_alias_meanwhile_is_not_undone(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    site.registry.promote("support", V2)
    await site.follow()
    site.engine.words[V2] = BROKEN
    await site.ask()

    async def peers() -> list[guard.Seen]:
        site.registry.shadow("support", V1, 0.5)
        return [site.guard.seen()]

    await site.guard.look(peers)
    assert (site.newest.number, site.newest.action) == (3, "shadow")


async def test_a_promotion_that_cannot_be_undone_is_said_once(
    made: Callable[..., Site], caplog: pytest.LogCaptureFixture
) -> None:
    site = made(**ERRORS)
    site.registry.promote("support", V2)
    site.registry.retire(V1)
    await site.follow()
    site.engine.words[V2] = BROKEN
    await site.ask()
    await site.guard.look()
    await site.guard.look()
    said = [record.message for record in caplog.records if "cannot take the version back" in record.message]
    assert len(said) == 1
    assert "its state before named support@v1, which is retired" in said[0]


async def test_it_looks_by_itself(made: Callable[..., Site]) -> None:
    site = made(**ERRORS, check_s=0.05)
    site.registry.promote("support", V2)
    site.engine.words[V2] = BROKEN
    await site.gateway._catalogue.refresh()
    await asyncio.sleep(0.2)
    await site.ask()
    await until(lambda: site.newest.action == "rollback")


async def test_it_begins_and_ends_with_the_application(made: Callable[..., Site]) -> None:
    site = made(**ERRORS)
    await site.guard.close()
    told: asyncio.Queue[Message] = asyncio.Queue()
    said: asyncio.Queue[Message] = asyncio.Queue()
    life: Any = site.gateway.app()({"type": "lifespan"}, told.get, said.put)
    app = asyncio.create_task(life)
    await told.put({"type": "lifespan.startup"})
    assert (await said.get())["type"] == "lifespan.startup.complete"
    running = site.guard._tasks
    assert [task.done() for task in running] == [False, False]
    await told.put({"type": "lifespan.shutdown"})
    assert (await said.get())["type"] == "lifespan.shutdown.complete"
    assert [task.done() for task in running] == [True, True]
    await app
