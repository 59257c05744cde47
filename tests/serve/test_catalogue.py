from __future__ import annotations

import asyncio
import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from serve.catalogue import LIST_EVERY_S, MAX_AGE_S, PATIENCE_S, REMIND_S, Catalogue
from serve.errors import NotReadyError, RegistryError, RetiredModelError, UnknownModelError
from serve.registry import Contents, Registry
from serve.traffic import Target
from serve.versions import VersionId
from sft.adapter import MANIFEST
from tests.bundles import tiny_bundle

pytestmark = pytest.mark.anyio

V1, V2, V3 = (VersionId("support", number) for number in (1, 2, 3))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class CountingRegistry(Registry):
    """A real registry that counts how often it is asked and listed, and can be away or slow."""

    reads = 0
    listings = 0
    broken = False
    hangs: threading.Event | None = None

    def changed(self) -> bytes | None:
        self.reads += 1
        if self.hangs:
            self.hangs.wait(20)
        if self.broken:
            raise RegistryError("the disk is away")
        return super().changed()

    def contents(self) -> Contents:
        self.listings += 1
        return super().contents()


@pytest.fixture
def registry(tmp_path: Path) -> CountingRegistry:
    made = CountingRegistry.open(tmp_path / "registry", create=True)
    tiny_bundle(tmp_path / "bundle")
    made.publish(tmp_path / "bundle", "support")
    made.promote("support", V1)
    return made


@pytest.fixture
def publish(registry: CountingRegistry, tmp_path: Path) -> Callable[[], VersionId]:
    return lambda: registry.publish(tmp_path / "bundle", "support").id


def catalogue(registry: Registry, clock: Clock) -> Catalogue:
    return Catalogue("base", lambda: registry, clock=clock)


def stale_since(known: Catalogue) -> datetime | None:
    """Asked anew each time: a type checker would take the first answer for the last."""
    return known.stale_since


async def test_it_is_read_at_most_once_a_second(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    for _ in range(5):
        assert (await known.target("support")).version == V1
    assert registry.reads == 1
    clock.now += MAX_AGE_S + 0.01
    await asyncio.gather(*(known.target("support") for _ in range(20)))
    assert registry.reads == 2


async def test_an_alias_that_moved_is_followed_within_that_second(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    registry.promote("support", publish())
    assert (await known.target("support")).version == V1
    clock.now += MAX_AGE_S + 0.01
    assert (await known.target("support")).version == V2


async def test_an_unknown_name_is_looked_up_at_once(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("base")
    publish()
    clock.now += 0.001
    assert (await known.target("support@v2")).version == V2


async def test_unknown_names_cannot_hammer_the_registry(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("base")
    clock.now += 0.001
    refused = await asyncio.gather(*(known.target("nothing") for _ in range(50)), return_exceptions=True)
    assert {type(error) for error in refused} == {UnknownModelError}
    assert registry.reads == 2


async def test_the_last_view_outlives_the_registry(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    registry.broken = True
    clock.now += 60
    assert (await known.target("support")).version == V1
    with pytest.raises(UnknownModelError):
        await known.target("nothing")


async def test_a_registry_that_did_not_change_is_not_listed_again(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    for _ in range(10):
        await known.target("support")
        clock.now += MAX_AGE_S + 0.01
    assert (registry.reads, registry.listings) == (10, 1)
    publish()
    clock.now += MAX_AGE_S + 0.01
    assert (await known.target("support@v2")).version == V2
    assert registry.listings == 2


async def test_a_change_without_a_new_token_is_seen_in_time(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    folder = Path(registry.address) / "versions/support"
    shutil.copytree(folder / "v1", folder / "v2")
    clock.now += MAX_AGE_S + 0.01
    with pytest.raises(UnknownModelError):
        await known.target("support@v2")
    clock.now += LIST_EVERY_S
    assert (await known.target("support@v2")).version == V2


async def test_under_steady_load_nobody_waits_for_a_read(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    registry.hangs = threading.Event()
    clock.now += MAX_AGE_S * 0.6
    async with asyncio.timeout(5):
        assert (await known.target("support")).version == V1
    assert stale_since(known) is None
    registry.hangs.set()
    await asyncio.sleep(0.2)
    assert registry.reads == 2


async def test_a_slow_registry_holds_nobody_up_for_long(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    registry.hangs = threading.Event()
    clock.now += MAX_AGE_S + 0.01
    began = time.monotonic()
    assert (await known.target("support")).version == V1
    assert PATIENCE_S * 0.9 < time.monotonic() - began < 5
    clock.now += 60
    began = time.monotonic()
    for _ in range(100):
        assert (await known.target("support")).version == V1
    assert time.monotonic() - began < PATIENCE_S
    assert registry.reads == 2
    assert stale_since(known) is not None
    registry.hangs.set()
    await asyncio.sleep(0.2)
    assert stale_since(known) is None


async def test_it_says_since_when_its_state_is_the_last_known(
    registry: CountingRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ray.serve")
    clock = Clock()
    known = catalogue(registry, clock)
    began = datetime.now(UTC)
    await known.target("support")
    assert stale_since(known) is None
    registry.broken = True
    for _ in range(30):
        clock.now += MAX_AGE_S + 0.01
        await known.target("support")
    since = stale_since(known)
    assert since
    assert began <= since <= datetime.now(UTC)
    assert registry.reads == 31
    said = f"cannot be read, so its state of {since:%Y-%m-%d %H:%M:%SZ} stays in force: the disk is away"
    assert [record.getMessage() for record in caplog.records] == [f"the registry {said}"]
    clock.now += REMIND_S
    await known.target("support")
    assert len(caplog.records) == 2
    registry.broken = False
    clock.now += MAX_AGE_S + 0.01
    await known.target("support")
    assert stale_since(known) is None
    assert caplog.records[-1].getMessage() == "the registry can be read again"


async def test_it_never_goes_back(
    registry: CountingRegistry, publish: Callable[[], VersionId], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(registry.address, tmp_path / "backup")
    publish()
    registry.promote("support", V2)
    registry.retire(V1)
    clock = Clock()
    registries: list[Registry] = [registry, Registry.open(tmp_path / "backup")]
    known = Catalogue("base", lambda: registries[0], clock=clock)
    assert (await known.target("support")).version == V2
    known._registry = registries[1]
    clock.now += MAX_AGE_S + 0.01
    assert (await known.target("support")).version == V2
    assert "support went back to entry 1 in the registry; not followed" in caplog.text
    assert (await known.known()).versions == {V1, V2}
    with pytest.raises(RetiredModelError):
        await known.target("support@v1")


async def test_canary_and_shadow_reach_the_choice(registry: CountingRegistry, publish: Callable[[], VersionId]) -> None:
    publish(), publish()
    registry.canary("support", V2, 0.5)
    registry.shadow("support", V3, 1)
    known = catalogue(registry, Clock())
    chosen = [await known.choose("support", "one session") for _ in range(5)]
    assert len(set(chosen)) == 1
    assert chosen[0].shadow == Target("base", V3)
    answering = {(await known.target("support")).version for _ in range(100)}
    assert answering == {V1, V2}
    assert (await known.known()).wanted() == {V1, V2, V3}


async def test_a_retired_version_is_neither_served_nor_listed(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    publish()
    registry.retire(V2)
    known = catalogue(registry, Clock())
    with pytest.raises(RetiredModelError, match="support@v2"):
        await known.target("support@v2")
    assert [version.id for version in await known.versions()] == [V1]
    assert registry.reads == 1


async def test_a_registry_that_was_never_read_is_an_error_and_tried_again(registry: CountingRegistry) -> None:
    known = catalogue(registry, Clock())
    registry.broken = True
    with pytest.raises(RegistryError):
        await known.target("base")
    registry.broken = False
    assert (await known.target("base")).version is None


async def test_a_damaged_version_is_left_out_of_the_list(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    publish()
    (Path(registry.address) / "versions/support/v1" / MANIFEST).write_text("{}")
    known = catalogue(CountingRegistry.open(registry.address), Clock())
    assert [version.id for version in await known.versions()] == [V2]


class Replicas:
    """Engine replicas that hold versions when they are told that they may."""

    def __init__(self) -> None:
        self.asked: list[frozenset[VersionId]] = []
        self.ready = asyncio.Event()
        self.refused: dict[VersionId, str] = {}
        self.down = 0

    async def prepare(self, versions: frozenset[VersionId]) -> Mapping[VersionId, str]:
        self.asked.append(versions)
        await self.ready.wait()
        if self.down:
            self.down -= 1
            raise NotReadyError("no engine replica answers")
        return {version: fault for version, fault in self.refused.items() if version in versions}


async def test_an_alias_moves_only_when_all_replicas_hold_the_version(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    replicas = Replicas()
    known = Catalogue("base", lambda: registry, replicas.prepare)
    assert (await known.target("support")).version == V1
    registry.promote("support", publish())
    await known.refresh()
    assert (await known.target("support")).version == V1
    assert (await known.target("support@v2")).version == V2  # by its own name at once
    replicas.ready.set()
    await known.refresh()
    assert (await known.target("support")).version == V2
    assert replicas.asked == [frozenset({V2})]
    assert known.generations() == {"support": (2, frozenset({V2}))}
    # What it came from is held all the time, so the way back asks nobody.
    replicas.ready.clear()
    registry.rollback("support")
    await known.refresh()
    assert (await known.target("support")).version == V1
    assert len(replicas.asked) == 1


async def test_an_alias_stays_where_a_replica_refuses_the_version(
    registry: CountingRegistry, publish: Callable[[], VersionId], caplog: pytest.LogCaptureFixture
) -> None:
    replicas = Replicas()
    replicas.ready.set()
    replicas.refused = {V2: "support@v2 cannot be served: it has no effect"}
    known = Catalogue("base", lambda: registry, replicas.prepare)
    await known.known()
    registry.promote("support", publish())
    await known.refresh()
    assert (await known.target("support")).version == V1
    assert known.held_back == {"support": "support@v2 cannot be served: it has no effect"}
    assert "support stays where it is; entry 2 is not followed: support@v2 cannot be served" in caplog.text
    registry.promote("support", publish())
    await known.refresh()
    assert (await known.target("support")).version == VersionId("support", 3)
    assert known.held_back == {}


async def test_a_newer_entry_overtakes_one_that_is_being_prepared(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    replicas = Replicas()
    known = Catalogue("base", lambda: registry, replicas.prepare)
    await known.known()
    registry.promote("support", publish())
    await known.refresh()
    registry.promote("support", publish())
    await known.refresh()
    replicas.ready.set()
    await known.refresh()
    assert (await known.target("support")).version == VersionId("support", 3)
    assert known.generations() == {"support": (3, frozenset({VersionId("support", 3)}))}


async def test_an_alias_waits_for_replicas_that_are_down(
    registry: CountingRegistry, publish: Callable[[], VersionId], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.catalogue.AGAIN_S", 0.01)
    replicas = Replicas()
    replicas.ready.set()
    replicas.down = 2
    known = Catalogue("base", lambda: registry, replicas.prepare)
    await known.known()
    registry.promote("support", publish())
    await known.refresh()
    assert (await known.target("support")).version == V2
    assert len(replicas.asked) == 3


async def test_a_refresh_sees_what_was_written_before_it(
    registry: CountingRegistry, publish: Callable[[], VersionId]
) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.refresh()
    for version in (publish(), publish()):
        clock.now += 0.001
        registry.promote("support", version)
        await known.refresh()
        assert (await known.target("support")).version == version


async def test_a_refresh_does_not_fail_with_the_registry(registry: CountingRegistry) -> None:
    clock = Clock()
    known = catalogue(registry, clock)
    await known.target("support")
    registry.broken = True
    clock.now += 0.001
    await known.refresh()
    assert stale_since(known) is not None
    assert (await known.target("support")).version == V1
