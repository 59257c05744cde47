"""The short way of a streamed answer, from an engine's replica to a gateway on its node: no call per token.

Through a deployment's handle every token costs both sides more CPU time than vLLM's own server takes for it. So the
first item of a streamed answer is a `Ticket`: a gateway of the same node connects with it to a Unix socket and reads
the texts off that; only what ends the answer comes through the handle again. Where no gateway has connected by the
first text, such as from another node, all texts take the handle. Nothing listens on a network.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
import weakref
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

    path: str
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
    """Where a replica's gateways connect: a socket in a folder that only this user may enter."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="raysft-relay-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._path = f"{folder}/socket"
        self._senders: dict[bytes, Sender] = {}
        self._server: asyncio.Server | None = None
        self._starting = asyncio.Lock()

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Sender]:
        """The end of a new answer."""
        async with self._starting:
            if self._server is None:
                self._server = await asyncio.start_unix_server(self._enter, self._path)
        made = Sender(Ticket(self._path, secrets.token_bytes(SECRET_BYTES)))
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
        reader, writer = await asyncio.open_unix_connection(ticket.path)
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
