from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from serve.catalogue import MAX_AGE_S, Catalogue
from serve.errors import RegistryError, UnknownModelError
from serve.registry import Registry
from serve.versions import AliasEntry, VersionId
from sft.adapter import MANIFEST
from tests.bundles import tiny_bundle

pytestmark = pytest.mark.anyio

V1, V2 = VersionId("support", 1), VersionId("support", 2)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class CountingRegistry(Registry):
    """A real registry that counts how often it is read."""

    reads = 0
    broken = False

    def aliases(self) -> dict[str, AliasEntry]:
        self.reads += 1
        if self.broken:
            raise RegistryError("the disk is away")
        return super().aliases()


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
    return Catalogue("base", lambda: registry, clock)


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
