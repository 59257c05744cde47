from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.errors import RegistryError, VersionRefusedError
from serve.residents import REFUSED_S, Residents
from serve.versions import VersionId

pytestmark = pytest.mark.anyio
V = [VersionId("a", number) for number in range(1, 9)]


class Engine:
    """Loads and unloads; notes what it holds, and fails if a rule of `Residents` is broken."""

    def __init__(self) -> None:
        self.held: set[VersionId] = set()
        self.loaded: list[VersionId] = []
        self.unloaded: list[VersionId] = []
        self.faults: dict[VersionId, Exception] = {}
        self.pause = 0.0
        self.now = 0.0

    async def load(self, version: VersionId) -> str:
        self.loaded.append(version)
        await asyncio.sleep(self.pause)
        if version in self.faults:
            raise self.faults[version]
        assert version not in self.held
        self.held.add(version)
        return str(version)

    async def unload(self, version: VersionId, held: str) -> None:
        assert held == str(version)
        await asyncio.sleep(self.pause)
        self.held.remove(version)
        self.unloaded.append(version)

    def residents(self, limit: int) -> Residents[str]:
        return Residents(self.load, self.unload, limit, lambda: self.now)


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_version_is_loaded_once_for_all_who_ask_at_the_same_moment() -> None:
    engine = Engine()
    residents = engine.residents(2)

    async def one() -> str:
        async with residents.use(V[0]) as held:
            return held

    assert await asyncio.gather(*(one() for _ in range(20))) == ["a@v1"] * 20
    assert (engine.loaded, residents.loads, residents.versions) == ([V[0]], 1, (V[0],))


async def test_the_longest_unused_goes_and_nothing_that_is_used_or_wanted() -> None:
    engine = Engine()
    residents = engine.residents(2)
    assert await residents.want([V[0]]) == {}
    async with residents.use(V[1]):
        for version in (V[2], V[3], V[4]):
            engine.now += 1
            async with residents.use(version):
                pass
        await settle()
        assert residents.versions == (V[0], V[1])
    engine.now += 1
    async with residents.use(V[5]):
        await settle()
    await settle()
    assert residents.versions == (V[0], V[5])
    assert engine.unloaded == [V[2], V[3], V[4], V[1]]
    assert residents.evictions == 4


async def test_what_is_over_goes_when_its_last_request_has_ended() -> None:
    engine = Engine()
    residents = engine.residents(8)
    async with residents.use(V[0]), residents.use(V[1]):
        await residents.want([V[1]], ended=[V[0], V[1]])
        await settle()
        assert residents.versions == (V[0], V[1])
    await settle()
    assert list(residents.versions) == [V[1]]
    assert engine.held == {V[1]}


async def test_a_version_that_leaves_is_loaded_anew_only_after_it_has_left() -> None:
    engine = Engine()
    residents = engine.residents(8)
    async with residents.use(V[0]):
        pass
    engine.pause = 0.01
    await residents.want([], ended=[V[0]])
    await residents.want([V[0]])
    assert (engine.loaded, engine.unloaded, engine.held) == ([V[0], V[0]], [V[0]], {V[0]})


async def test_a_refusal_is_remembered_for_a_while_and_other_faults_are_not() -> None:
    engine = Engine()
    engine.faults = {V[0]: VersionRefusedError("it is bad"), V[1]: RegistryError("down")}
    residents = engine.residents(8)
    assert await residents.hold([V[0], V[2]]) == {V[0]: "it is bad"}
    for _ in range(3):
        with pytest.raises(VersionRefusedError, match="it is bad"):
            async with residents.use(V[0]):
                pass
        with pytest.raises(RegistryError):
            await residents.hold([V[1]])
    assert (engine.loaded.count(V[0]), engine.loaded.count(V[1])) == (1, 3)
    engine.now, engine.faults = REFUSED_S, {}
    assert await residents.hold(V[:3]) == {}
    assert residents.versions == tuple(V[:3])


async def test_who_stops_waiting_stops_nobody_else() -> None:
    engine = Engine()
    engine.pause = 0.02
    residents = engine.residents(8)
    first, second = (asyncio.create_task(residents.hold([V[0]])) for _ in range(2))
    await asyncio.sleep(0.005)
    first.cancel()
    assert await second == {}
    assert engine.loaded == [V[0]]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_no_order_of_things_takes_a_version_from_its_user(seed: int, limit: int) -> None:
    draw = random.Random(seed)
    engine = Engine()

    async def run() -> None:
        residents = engine.residents(limit)

        async def user() -> None:
            for _ in range(6):
                version = draw.choice(V)
                async with residents.use(version) as held:
                    for _ in range(draw.randrange(4)):
                        assert held == str(version)
                        assert version in engine.held
                        await asyncio.sleep(0)

        async def owner() -> None:
            for _ in range(6):
                await residents.want(draw.sample(V, 2), draw.sample(V, 2))
                engine.now += 1

        await asyncio.gather(*(user() for _ in range(6)), owner())
        last = V[:1]
        await residents.want(last)
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(residents.use(V[0]))
        await settle()
        assert set(residents.versions) == engine.held
        assert len(engine.held) <= max(limit, 1)
        assert V[0] in engine.held

    asyncio.run(run())
