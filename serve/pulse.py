"""Whether an engine is alive: one that hangs goes on answering the health checks of its front end."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from serve.errors import NotReadyError


class Pulse:
    """Watches an engine's progress; asks it for a token only where nothing else shows that it lives.

    Args:
        probe: has the engine make one token within so many seconds, or raises `NotReadyError`.
        stall_s: longest silence that is no fault, in seconds.
        clock: seconds, ever growing.
    """

    def __init__(
        self, probe: Callable[[float], Awaitable[None]], stall_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe, self._stall_s, self._clock = probe, stall_s, clock
        self._working = 0
        self._beat_at = clock()

    def beat(self) -> None:
        """The engine gave a sign of life."""
        self._beat_at = self._clock()

    @contextmanager
    def work(self) -> Iterator[None]:
        """Around a request."""
        self._working += 1
        try:
            yield
        finally:
            self._working -= 1

    async def check(self) -> None:
        """Raises where the engine hangs.

        Raises:
            NotReadyError: nothing came from the engine for `stall_s`, not even the token that it was asked for.
        """
        silence = self._clock() - self._beat_at
        if silence < self._stall_s / 2:
            return
        try:
            await self._probe(self._stall_s / 2)
        except NotReadyError:
            if self._clock() - self._beat_at < self._stall_s:  # busy, not hung: other work went on meanwhile
                return
            raise NotReadyError(
                f"the engine hangs: nothing came from it for {self._clock() - self._beat_at:.0f} s, "
                f"with {self._working} requests waiting"
            ) from None
        self.beat()
