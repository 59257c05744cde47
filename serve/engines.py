"""The engines behind a gateway: what a gateway needs of them, and the ones of a Serve deployment."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from serve.errors import FullError, NotReadyError, failure_of
from serve.items import Item
from serve.relay import Ticket, texts
from serve.requests import Route
from serve.traffic import Target

HEALTH_TIMEOUT_S = 10.0
LOST = "the engine was lost; try again in a moment"

logger = logging.getLogger("ray.serve")


class Engine(Protocol):
    """What a gateway needs of the engines behind it."""

    def answer(self, route: Route, body: dict[str, Any], target: Target, request_id: str) -> AsyncGenerator[Item, None]:
        """Answers a request; closing the generator early stops the engine's work on it."""
        ...

    async def check(self) -> None:
        """Raises `NotReadyError` unless an engine can answer."""
        ...


class ServeEngine:
    """The engines of a Serve deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle: Any = handle  # its methods are the deployment's, which no type knows
        # No adapter affinity: every replica holds what is wanted, so a hot adapter may use all of them.
        self._streaming: Any = self._handle.options(stream=True)

    async def answer(
        self, route: Route, body: dict[str, Any], target: Target, request_id: str
    ) -> AsyncGenerator[Item, None]:
        """See `Engine`."""
        items = self._streaming.answer.remote(route, body, target, request_id)
        ended = False
        try:
            async for item in items:
                if isinstance(item, Ticket):
                    async with aclosing(texts(item)) as relayed:
                        async for text in relayed:
                            yield text
                    continue
                ended = not isinstance(item, str)
                yield item
        except BackPressureError:
            ended = True
            yield failure_of(FullError("the server is full; try again in a moment"))
        except (RayError, RayServeException):
            ended = True
            logger.exception("the engine was lost while it answered request %s", request_id)
            yield failure_of(NotReadyError(LOST))
        finally:
            if not ended:
                items.cancel()  # Serve itself lets the engine go on for a caller that no longer listens

    async def check(self) -> None:
        """See `Engine`."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._handle.check_health.remote()
        except (TimeoutError, RayError, RayServeException):
            raise NotReadyError("the engine does not answer") from None
