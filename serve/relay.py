"""The short way of a streamed answer from an engine's replica to a gateway: a plain connection, and no call per token.

Through a deployment's handle every token costs both sides more CPU time than vLLM's own server takes for it. So the
first item of a streamed answer is a `Ticket`: the gateway connects with it and reads the texts off the connection, and
only what ends the answer comes through the handle again. Where no gateway has connected by the first text, such as
across a firewall, all texts take the handle.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

SECRET_BYTES = 16
HELLO_S = 5.0
READ_BYTES = 64 * 2**10
EVENT_END = b"\n\n"


@dataclass(frozen=True, slots=True)
class Ticket:
    """Where one answer can be read, once, by who knows the secret."""

    host: str
    port: int
    secret: bytes


class Sender:
    """The replica's end of one answer. Rule: either all its texts go this way, or none."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._writer: asyncio.StreamWriter | None = None
        self._begun = False

    def accept(self, writer: asyncio.StreamWriter) -> bool:
        """Takes a gateway's connection; no second one, and none once the texts go the other way."""
        if self._writer is not None or self._begun:
            return False
        self._writer = writer
        return True

    async def send(self, text: str) -> bool:
        """Sends whole events; false if they have to go through the handle.

        What a gateway that left does not read is dropped: it cancels the answer through the handle.
        """
        self._begun = True
        if self._writer is None:
            return False
        with suppress(ConnectionError):
            self._writer.write(text.encode())
            await self._writer.drain()
        return True

    def close(self) -> None:
        """Tells the gateway that this was all."""
        self._begun = True
        if self._writer is not None:
            self._writer.close()


class Relay:
    """Where a replica's gateways connect.

    Args:
        host: this node's address, as other nodes know it.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._senders: dict[bytes, Sender] = {}
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Sender]:
        """The end of a new answer."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_server(self._enter, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        made = Sender(Ticket(self._host, port, secrets.token_bytes(SECRET_BYTES)))
        self._senders[made.ticket.secret] = made
        try:
            yield made
        finally:
            del self._senders[made.ticket.secret]
            made.close()

    async def _enter(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken = False
        try:
            async with asyncio.timeout(HELLO_S):
                sender = self._senders.get(await reader.readexactly(SECRET_BYTES))
            taken = sender is not None and sender.accept(writer)
        except (TimeoutError, EOFError, OSError):
            pass
        finally:
            if not taken:
                writer.close()


async def texts(ticket: Ticket) -> AsyncGenerator[str, None]:
    """The gateway's end: texts of whole events, until the replica ends them or is lost; the handle tells which."""
    try:
        reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
    except OSError:
        return
    try:
        writer.write(ticket.secret)
        left = b""
        while data := await reader.read(READ_BYTES):
            whole, end, left = (left + data).rpartition(EVENT_END)
            if end:
                yield (whole + end).decode()
    except OSError:
        return
    finally:
        writer.close()
