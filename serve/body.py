"""The bytes of a request's body: no more of them, and for no longer, than the server allows."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from serve.errors import BodyTimeoutError, BodyTooLargeError, ClientGoneError, EndlessBodyError, MediaTypeError

JSON = "application/json"


async def read_bytes(request: Request, limit: int, seconds: float, *, strict: bool = False) -> bytes:
    """Reads a body, and stops at the first byte too many.

    Args:
        request: its body was not touched before.
        limit: most bytes.
        seconds: longest time for the client to send them.
        strict: refuse a body that is said to be nothing, too. A web page can send such a one from anywhere.

    Raises:
        MediaTypeError: the body is said to be something else than JSON.
        BodyTooLargeError: it is too large, or is said to be.
        BodyTimeoutError: it took too long.
        ClientGoneError: the client went away.
    """
    kind = request.headers.get("content-type", "" if strict else JSON).partition(";")[0].strip().lower()
    if kind != JSON:
        raise MediaTypeError(f"content-type must be {JSON}, got {kind[:80] or 'nothing'}")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and (len(stated) > 18 or int(stated) > limit):
        raise BodyTooLargeError(_too_large(limit))
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientGoneError("the client went away before its request was whole")
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise EndlessBodyError(_too_large(limit))
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise BodyTimeoutError(f"the request was not whole within {seconds:g} s") from None


def _too_large(limit: int) -> str:
    return f"the body is above this server's limit of {limit:,} bytes"
