"""Proxy: stands between clients and a PostgreSQL server, knows where a frame ends, and fails them on purpose.

What a client is doing is told from the texts of its statements, so a connection can be cut before a COMMIT arrives, or
after it did and before its answer is back.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Literal, Self

__all__ = ["Link", "Proxy", "Trap"]

_LENGTH = struct.Struct("!I")
_NO_STARTUP = (80877103, 80877104, 80877102)
_CHUNK = 65_536
# Closing then sends a reset, and what was not sent yet is gone.
_RESET = struct.pack("ii", 1, 0)
_GONE = (ConnectionError, EOFError, TimeoutError, OSError)


class Trap:
    """Waits for the next client that reaches a stage, and holds it there.

    `before`: the server never hears of the statement. `after`: the server has done it, and the client hears nothing.
    """

    def __init__(self, stage: str, when: Literal["before", "after"], spared: str = "") -> None:
        self.stage = stage
        self.when = when
        self.spared = spared
        self.caught: asyncio.Future[Link] = asyncio.get_running_loop().create_future()
        self.given_up = False

    def hold(self, link: Link) -> None:
        """Hold a client for whoever set the trap; who comes when he has gone is cut, and not held for ever."""
        if self.given_up:
            link.cut()
        else:
            self.caught.set_result(link)


class Proxy:
    """Listens on 127.0.0.1 and passes everything on, until it is told otherwise. `stages` names statements by text."""

    def __init__(self, port: int, stages: Mapping[str, str]) -> None:
        self.links: set[Link] = set()
        self._upstream = port
        self._stages = stages
        self._traps: list[Trap] = []

    @property
    def port(self) -> int:
        """Where clients connect."""
        return int(self._server.sockets[0].getsockname()[1])

    async def catch(self, stage: str, when: Literal["before", "after"], within: float, spared: str = "") -> Link | None:
        """Return the next client that reaches the stage, held there; None when none does in time. Cut it afterwards.

        Whose name begins with `spared` is let pass.
        """
        trap = Trap(stage, when, spared)
        self._traps.append(trap)
        try:
            async with asyncio.timeout(within):
                return await asyncio.shield(trap.caught)
        except TimeoutError:
            return trap.caught.result() if trap.caught.done() else None
        finally:
            trap.given_up = not trap.caught.done()
            if trap in self._traps:
                self._traps.remove(trap)

    def stage_of(self, statement: str) -> str:
        """Return the name of the stage a statement belongs to; empty when it has none."""
        return "commit" if statement[:6].upper() == "COMMIT" else self._stages.get(statement, "")

    def spring(self, stage: str, name: str) -> Trap | None:
        """Return the trap that the client of this name steps into at a stage."""
        for trap in self._traps:
            if trap.stage == stage and not (trap.spared and name.startswith(trap.spared)):
                self._traps.remove(trap)
                return trap
        return None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._server.close()
        for link in tuple(self.links):
            link.cut()
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(*_GONE):
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
            link = Link(self, (reader, writer), (up_reader, up_writer))
            self.links.add(link)
            try:
                await link.run()
            finally:
                self.links.discard(link)
                link.cut()
        writer.transport.abort()


class Link:
    """One client's connection. `name` is its application_name."""

    def __init__(
        self,
        proxy: Proxy,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self.name = ""
        self.hole = False
        self.slow = False
        self._deaf: Trap | None = None
        self._springing: Trap | None = None
        self._proxy = proxy
        self._reader, self._writer = client
        self._up_reader, self._up_writer = server
        self._prepared: dict[bytes, str] = {}
        self._started = False
        self._over = asyncio.Event()

    async def run(self) -> None:
        """Pass on in both directions until either side goes away; a hole swallows that too, until somebody cuts."""
        pumps = [asyncio.create_task(pump) for pump in (self._outward(), self._inward(), self._wait())]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            if self.hole:
                await self._over.wait()
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def cut(self) -> None:
        """Reset the client's connection, and end the server's."""
        self._over.set()
        with suppress(OSError):
            self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()
        self._up_writer.transport.abort()

    async def _wait(self) -> None:
        await self._over.wait()

    async def _inward(self) -> None:
        while data := await self._up_reader.read(_CHUNK):
            if self._deaf is not None and not self._deaf.caught.done():
                self._deaf.hold(self)
            if self.hole or self._deaf is not None:
                continue
            for chunk in _chunks(data, 100 if self.slow else _CHUNK):
                self._writer.write(chunk)
                await self._writer.drain()
                if self.slow:
                    await asyncio.sleep(0.01)

    async def _outward(self) -> None:
        unread = b""
        while data := await self._reader.read(_CHUNK):
            unread += data
            ready = b""
            while size := self._size(unread):
                frame, unread = unread[:size], unread[size:]
                trap = self._look(frame)
                if trap is not None and trap.when == "before":
                    await self._forward(ready)
                    trap.hold(self)
                    # Whoever set the trap cuts us.
                    await self._over.wait()
                    return
                self._springing = trap or self._springing
                ready += frame
                if self._springing is not None and frame[:1] in b"QS":
                    self._deaf = self._springing
            await self._forward(ready)

    async def _forward(self, frames: bytes) -> None:
        if frames and not self.hole:
            self._up_writer.write(frames)
            await self._up_writer.drain()

    def _size(self, unread: bytes) -> int:
        """Return how long the first frame is, zero while it is not complete."""
        head = 1 if self._started else 0
        if len(unread) < head + 4:
            return 0
        size = head + int(_LENGTH.unpack_from(unread, head)[0])
        return size if len(unread) >= size else 0

    def _look(self, frame: bytes) -> Trap | None:
        """Learn what a frame says, and return the trap it steps into."""
        if not self._started:
            self._start(frame)
            return None
        kind, body, stage = frame[:1], frame[5:], ""
        if kind == b"P":
            name, statement, _ = body.split(b"\0", 2)
            self._prepared[name] = self._proxy.stage_of(statement.decode())
        elif kind == b"B":
            stage = self._prepared.get(body.split(b"\0", 2)[1], "")
        elif kind == b"Q":
            stage = self._proxy.stage_of(body.rstrip(b"\0").decode())
        return self._proxy.spring(stage, self.name) if stage and self._springing is None else None

    def _start(self, frame: bytes) -> None:
        if _LENGTH.unpack_from(frame, 4)[0] in _NO_STARTUP:
            return
        self._started = True
        words = frame[8:].split(b"\0")
        self.name = dict(zip(words[::2], words[1::2], strict=False)).get(b"application_name", b"").decode()


def _chunks(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))
