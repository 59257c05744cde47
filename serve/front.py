"""The outermost layer of the gateway: every request gets an id and a record, and leaves a line and its counts.

A request id comes from the client's `x-request-id` where that is well-formed, and goes on to the engine, into every
line of the logs and back in the answer.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.access_log import CLIENT_GONE, AccessLog, Record
from serve.metrics import Metrics

ID_HEADER = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")
_RECORD = "raysft.record"

logger = logging.getLogger("ray.serve")


class Front:
    """Wraps the routes.

    Args:
        app: the routes.
        log: takes a line of every request.
        metrics: takes the counts.
        returns_ids: whether the server in front sends the client's `x-request-id` back by itself, as Serve's does.
    """

    def __init__(self, app: ASGIApp, log: AccessLog, metrics: Metrics, *, returns_ids: bool = False) -> None:
        self._app, self._log, self._metrics, self._returns_ids = app, log, metrics, returns_ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for name, value in scope["headers"] if name == ID_HEADER), None)
        request_id = given if given and _ID.fullmatch(given) else uuid.uuid4().hex.encode()
        record = Record(request_id.decode(), scope["method"], scope["path"], time.monotonic())
        scope[_RECORD] = record
        header = [] if self._returns_ids and request_id == given else [(ID_HEADER, request_id)]

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *header]}
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            # The client has its answer already; what is raised again after it is for servers that log nothing.
            if record.status == 0:
                raise
        finally:
            record.status = record.status or CLIENT_GONE
            if record.ended_at is None:
                record.ended_at = time.monotonic()
            self._metrics.observe(record, _route(scope))
            self._log.request(record)


def record_of(scope: Mapping[str, Any]) -> Record:
    """The record of a request, of its ASGI scope."""
    record: Record = scope[_RECORD]
    return record


def _route(scope: Mapping[str, Any]) -> str:
    """The pattern of the route that was taken, never the path itself, which is the client's to choose."""
    return str(getattr(scope.get("route"), "path", ""))
