from __future__ import annotations

import asyncio

import pytest
from starlette.requests import Request
from starlette.types import Message

from serve.body import read_bytes
from serve.errors import BodyTimeoutError, BodyTooLargeError, ClientGoneError, MediaTypeError

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


class Sender:
    """Sends a body in parts, and notes how many were taken."""

    def __init__(self, *parts: bytes | None) -> None:
        self.parts, self.taken = parts, 0

    async def receive(self) -> Message:
        if self.taken == len(self.parts):
            await asyncio.Event().wait()
        part = self.parts[self.taken]
        self.taken += 1
        if part is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": part, "more_body": part != b"end"}

    def request(self, **headers: str) -> Request:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        return Request({"type": "http", "method": "POST", "headers": raw}, self.receive)


async def test_a_body_in_parts() -> None:
    assert await read_bytes(Sender(b"a", b"", b"b", b"end").request(), 5, 1) == b"abend"


async def test_reading_stops_at_the_first_byte_too_many() -> None:
    sender = Sender(*[b"12345"] * 1000)
    with pytest.raises(BodyTooLargeError, match="above this server's limit of 12 bytes"):
        await read_bytes(sender.request(), 12, 1)
    assert sender.taken == 3


@pytest.mark.parametrize("length", ["13", "9" * 5000])
async def test_a_stated_length_is_believed_before_anything_is_read(length: str) -> None:
    sender = Sender(b"end")
    with pytest.raises(BodyTooLargeError):
        await read_bytes(sender.request(content_length=length), 12, 1)
    assert sender.taken == 0


@pytest.mark.parametrize("length", ["3", "-5", "x", ""])
async def test_a_length_that_says_nothing_is_passed_over(length: str) -> None:
    assert await read_bytes(Sender(b"end").request(content_length=length), 12, 1) == b"end"


async def test_a_slow_client_is_not_waited_for() -> None:
    with pytest.raises(BodyTimeoutError, match=r"not whole within 0\.02 s"):
        await read_bytes(Sender(b"a").request(), 12, 0.02)


async def test_a_client_that_leaves() -> None:
    with pytest.raises(ClientGoneError):
        await read_bytes(Sender(b"a", None).request(), 12, 1)


@pytest.mark.parametrize(
    ("kind", "fine", "fine_when_strict"),
    [
        ("application/json", True, True),
        ("Application/JSON; charset=utf-8", True, True),
        (None, True, False),
        ("text/plain", False, False),
        ("application/x-www-form-urlencoded", False, False),
        ("", False, False),
    ],
)
async def test_only_json_is_read(kind: str | None, fine: bool, fine_when_strict: bool) -> None:
    headers = {} if kind is None else {"content_type": kind}
    for strict, expected in ((False, fine), (True, fine_when_strict)):
        request = Sender(b"end").request(**headers)
        if expected:
            assert await read_bytes(request, 12, 1, strict=strict) == b"end"
        else:
            with pytest.raises(MediaTypeError, match="content-type must be application/json"):
                await read_bytes(request, 12, 1, strict=strict)
