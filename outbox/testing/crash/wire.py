"""Wire: how relays ask the secondaries of a run, one call per connection on a local socket."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import msgspec

__all__ = ["Request", "ask", "receive", "send"]

_LENGTH = struct.Struct("!I")


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request. `events` are (position, tenant, type, id, content); `asks` names what is wanted."""

    asks: str
    backend_id: str = ""
    caller: str = ""
    attempt_id: int = 0
    events: list[tuple[int, str, str, str, str | None]] = []
    fault: str = ""
    seconds: float = 0
    number: int = 0


async def ask(path: str, request: Request) -> Any:
    """Return the answer. Raises `OSError` or `EOFError` when there is none, whatever was done."""
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        await send(writer, request)
        return msgspec.msgpack.decode(await receive(reader))
    finally:
        writer.close()


async def receive(reader: asyncio.StreamReader) -> bytes:
    """Return what the other side sent. Raises `EOFError` when it went away first."""
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


async def send(writer: asyncio.StreamWriter, what: object) -> None:
    """Send anything that msgspec knows."""
    sent = msgspec.msgpack.encode(what)
    writer.write(_LENGTH.pack(len(sent)) + sent)
    await writer.drain()
