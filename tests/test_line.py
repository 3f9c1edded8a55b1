"""The line: what a client meets and what the server did, for every trouble it can make, in no protocol at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from outbox.testing.line import Line, Trouble
from tests.waiting import eventually


class Echo:
    """Answers every line with itself."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.serving = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving += 1
        with suppress(ConnectionError):
            while said := await reader.readline():
                self.heard.append(said)
                writer.write(said)
                await writer.drain()
        writer.close()
        self.serving -= 1


@pytest.fixture
async def echo() -> AsyncIterator[tuple[Echo, Line]]:
    echo = Echo()
    async with (
        await asyncio.start_server(echo.serve, "127.0.0.1", 0) as server,
        Line(server.sockets[0].getsockname()[1]) as line,
    ):
        yield echo, line
    await eventually(lambda: not echo.serving)


@asynccontextmanager
async def client(line: Line) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", line.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def asked(line: Line, said: bytes) -> bytes:
    """Return what comes back before the end, empty when nothing does. Raises `ConnectionError` when it is a reset."""
    async with client(line) as (reader, writer):
        writer.write(said)
        return await reader.read(1_000)


@pytest.mark.parametrize(
    ("trouble", "comes", "heard"),
    [
        (Trouble.RESET_AT_ONCE, ConnectionError, False),
        (Trouble.LOSE_ANSWER, ConnectionError, True),
        (Trouble.CLOSE_INSTEAD, b"", False),
        (Trouble.BABBLE, b"HTTP", False),
        (Trouble.FLOOD, b"xxxx", False),
    ],
)
@pytest.mark.parametrize("connected", [True, False])
async def test_a_trouble_is_met_by_those_connected_and_by_those_who_come(
    echo: tuple[Echo, Line], trouble: Trouble, comes: bytes | type[Exception], heard: bool, connected: bool
) -> None:
    server, line = echo
    async with client(line) as (reader, writer):
        if connected:
            await eventually(lambda: line.calls)
        line.make(trouble)
        if isinstance(comes, bytes):
            assert (await _said_on(reader, writer) if connected else await asked(line, b"hello\n"))[:4] == comes
        else:
            with pytest.raises(comes):
                await (_said_on(reader, writer) if connected else asked(line, b"hello\n"))
    assert bool(server.heard) == heard
    await line.mend()
    async with client(line) as (reader, writer):
        writer.write(b"again\n")
        assert await reader.readline() == b"again\n"


async def _said_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"hello\n")
    return await reader.read(1_000)


@pytest.mark.parametrize("trouble", [Trouble.SILENCE, Trouble.SWALLOW_ANSWER])
async def test_who_is_left_without_an_answer_is_reset_in_the_end(echo: tuple[Echo, Line], trouble: Trouble) -> None:
    server, line = echo
    line.make(trouble)
    asking = asyncio.create_task(asked(line, b"hello\n"))
    await eventually(lambda: line.calls and next(iter(line.calls)).said)
    if trouble is Trouble.SWALLOW_ANSWER:
        await eventually(lambda: server.heard)
    assert not asking.done()
    await line.mend()
    with pytest.raises(ConnectionError):
        await asking
    assert bool(server.heard) == (trouble is Trouble.SWALLOW_ANSWER)


async def test_trouble_may_wait_for_what_a_client_says(echo: tuple[Echo, Line]) -> None:
    _, line = echo
    line.make(Trouble.LOSE_ANSWER, upon=b"commit")
    async with client(line) as (reader, writer):
        for said in (b"begin\n", b"insert\n"):
            writer.write(said)
            assert await reader.readline() == said
        writer.write(b"commit\n")
        with pytest.raises(ConnectionError):
            await reader.read(100)


async def test_a_trickle_loses_nothing(echo: tuple[Echo, Line]) -> None:
    _, line = echo
    line.make(Trouble.TRICKLE)
    async with client(line) as (reader, writer):
        writer.write(b"y" * 1_000 + b"\n")
        assert await reader.readuntil(b"\n") == b"y" * 1_000 + b"\n"


async def test_nobody_listens_until_it_is_mended(echo: tuple[Echo, Line]) -> None:
    _, line = echo
    await line.refuse()
    with pytest.raises(ConnectionRefusedError):
        await asked(line, b"hello\n")
    await line.mend()
    async with client(line) as (reader, writer):
        writer.write(b"x\n")
        assert await reader.readline() == b"x\n"
        line.hang_up()
        assert await reader.read() == b""
    await eventually(lambda: not line.calls)
