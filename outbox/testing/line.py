"""Line: stands between clients and any server, whatever they speak, and fails on purpose.

It knows bytes and connections only, so one and the same trouble can be made for every adapter.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from enum import StrEnum
from types import TracebackType
from typing import Self

from outbox.testing.process import free_port

__all__ = ["Call", "Line", "Trouble"]

_CHUNK = 65_536
# Closing then sends a reset, and what was not sent yet is gone.
_RESET = struct.pack("ii", 1, 0)
_GONE = (ConnectionError, EOFError, TimeoutError, OSError)
_PIECE, _PAUSE = 100, 0.001
_PAGE = b"<html><body>Back soon</body></html>"
_BABBLE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s" % (len(_PAGE), _PAGE)


class Trouble(StrEnum):
    """What a line does to its clients, those connected already included."""

    RESET_AT_ONCE = "reset at once"
    """Whoever connects, or says anything, is reset. The server hears nothing."""
    SILENCE = "silence"
    """Connections are taken, what is said is swallowed, nothing is answered."""
    SWALLOW_ANSWER = "swallow answer"
    """The server hears and does everything; its answers never arrive."""
    LOSE_ANSWER = "lose answer"
    """The server hears and does everything; instead of its answer comes a reset."""
    CUT_ANSWER = "cut answer"
    """The first four bytes of an answer arrive, then a reset."""
    CLOSE_INSTEAD = "close instead"
    """Instead of an answer the connection is closed in good order."""
    BABBLE = "babble"
    """Somebody else lives there: every word is answered with a page of HTML."""
    FLOOD = "flood"
    """An answer that never ends, without a line break."""
    TRICKLE = "trickle"
    """Answers arrive a hundred bytes at a time."""


class Line:
    """Listens on 127.0.0.1 and passes everything on, until it is told to make trouble.

    With `upon`, a connection is in trouble from the moment its client has said these bytes, and is served well before.
    """

    def __init__(self, upstream: int) -> None:
        self.port = free_port()
        self.calls: set[Call] = set()
        self.trouble: Trouble | None = None
        self.upon = b""
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._serving: set[asyncio.Task[object] | None] = set()

    def make(self, trouble: Trouble, upon: bytes = b"") -> None:
        """Make trouble from now on, until `mend`."""
        self.trouble, self.upon = trouble, upon
        for call in self.calls:
            call.said = b""

    def hang_up(self) -> None:
        """Close every connection from the server's side, once."""
        for call in tuple(self.calls):
            call.close()

    async def refuse(self) -> None:
        """Reset everybody, and listen no more until `mend`."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for call in tuple(self.calls):
            call.cut()

    async def mend(self) -> None:
        """Serve well again. Whoever was made to wait for an answer is reset, as its answer is gone."""
        if self.trouble in (Trouble.SILENCE, Trouble.SWALLOW_ANSWER, Trouble.FLOOD):
            for call in tuple(self.calls):
                call.cut()
        self.trouble = None
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def __aenter__(self) -> Self:
        await self.mend()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.refuse()
        # Whoever still serves when the loop ends is cancelled by it, and says so aloud.
        if serving := {task for task in self._serving if task is not None}:
            await asyncio.wait(serving)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = Call(self, reader, writer)
        self.calls.add(call)
        serving = asyncio.current_task()
        self._serving.add(serving)
        try:
            with suppress(*_GONE):
                await call.run(self._upstream)
        finally:
            self.calls.discard(call)
            self._serving.discard(serving)
            call.close()


class Call:
    """One client's connection, and the one to the server that goes with it."""

    def __init__(self, line: Line, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.said = b""
        self._line = line
        self._reader, self._writer = reader, writer
        self._up_writer: asyncio.StreamWriter | None = None
        self._over = asyncio.Event()

    async def run(self, upstream: int) -> None:
        """Pass on in both directions until either side goes away."""
        if self._trouble is Trouble.RESET_AT_ONCE:
            self.cut()
            return
        up_reader, self._up_writer = await asyncio.open_connection("127.0.0.1", upstream)
        ways = (self._outward(self._up_writer), self._inward(up_reader), self._over.wait())
        pumps: list[asyncio.Task[object]] = [asyncio.create_task(way) for way in ways]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def cut(self) -> None:
        """Reset the client's connection, and end the server's."""
        with suppress(OSError):
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()
        self._end()

    def close(self) -> None:
        """Close the client's connection in good order, and end the server's."""
        self._writer.close()
        self._end()

    def _end(self) -> None:
        self._over.set()
        if self._up_writer is not None:
            self._up_writer.transport.abort()

    @property
    def _trouble(self) -> Trouble | None:
        return self._line.trouble if self._line.upon in self.said else None

    async def _outward(self, server: asyncio.StreamWriter) -> None:
        while data := await self._reader.read(_CHUNK):
            # No sentence that trouble waits for is longer than what is remembered.
            self.said = (self.said + data)[-2 * _CHUNK :]
            if await self._passes(self._trouble):
                server.write(data)
                await server.drain()

    async def _passes(self, trouble: Trouble | None) -> bool:
        """Answer in the server's place if the trouble wants it so; say whether the server may hear it."""
        match trouble:
            case Trouble.RESET_AT_ONCE:
                self.cut()
            case Trouble.CLOSE_INSTEAD:
                self.close()
            case Trouble.BABBLE:
                self._writer.write(_BABBLE)
            case Trouble.FLOOD:
                await self._flood()
            case Trouble.SILENCE:
                pass
            case _:
                return True
        return False

    async def _flood(self) -> None:
        while self._line.trouble is Trouble.FLOOD:
            self._writer.write(b"x" * _CHUNK)
            await self._writer.drain()

    async def _inward(self, server: asyncio.StreamReader) -> None:
        while data := await server.read(_CHUNK):
            match self._trouble:
                case Trouble.LOSE_ANSWER:
                    self.cut()
                case Trouble.CUT_ANSWER:
                    self._writer.write(data[:4])
                    await self._writer.drain()
                    self.cut()
                case Trouble.TRICKLE:
                    await self._trickle(data)
                case None:
                    self._writer.write(data)
                    await self._writer.drain()
                case Trouble.SWALLOW_ANSWER:
                    pass
                case trouble:
                    # There are servers that speak first.
                    await self._passes(trouble)

    async def _trickle(self, data: bytes) -> None:
        for piece in _pieces(data):
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(_PAUSE)


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + _PIECE] for start in range(0, len(data), _PIECE))
