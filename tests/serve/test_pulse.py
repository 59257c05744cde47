from __future__ import annotations

import pytest

from serve.errors import NotReadyError
from serve.pulse import Pulse

pytestmark = pytest.mark.anyio


class Engine:
    """A clock, and an engine that answers a probe or waits it out; `meanwhile` runs while it is asked."""

    def __init__(self) -> None:
        self.now, self.alive, self.asked = 0.0, True, 0
        self.pulse = Pulse(self.probe, 60.0, lambda: self.now)
        self.busy = False

    async def probe(self, seconds: float) -> None:
        self.asked += 1
        if self.alive:
            return
        self.now += seconds
        if self.busy:
            self.pulse.beat()
        raise NotReadyError("no token")


async def test_an_engine_with_progress_is_not_asked() -> None:
    engine = Engine()
    engine.now = 29.0
    await engine.pulse.check()
    assert engine.asked == 0


async def test_an_idle_engine_is_asked_for_a_token() -> None:
    engine = Engine()
    engine.now = 31.0
    await engine.pulse.check()
    await engine.pulse.check()
    assert engine.asked == 1


async def test_a_hung_engine_is_told() -> None:
    engine = Engine()
    engine.now, engine.alive = 31.0, False
    with engine.pulse.work(), pytest.raises(NotReadyError, match="nothing came from it for 61 s, with 1 requests"):
        await engine.pulse.check()


async def test_a_busy_engine_is_not_taken_for_a_hung_one() -> None:
    engine = Engine()
    engine.now, engine.alive, engine.busy = 31.0, False, True
    await engine.pulse.check()
