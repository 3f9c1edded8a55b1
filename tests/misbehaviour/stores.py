"""A store of resources behind a connection of its own, as an application may have one: JSON lines over TCP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from examples.sqlite_storage import SqliteStorage
from outbox import ResourceBusy, ResourceRefused, StoredResource, Unavailable
from tests.waiting import eventually

ERRORS: dict[str, Callable[[str], Exception]] = {
    "busy": lambda code: ResourceBusy(code, "not now"),
    "refused": lambda code: ResourceRefused(code, "never"),
    "unavailable": lambda code: Unavailable(code, "not here"),
}


class RemoteStorage:
    """Asks a `StorageServer`, with a connection for every question."""

    def __init__(self, port: int, timeout: float, host: str = "127.0.0.1") -> None:
        self._address = host, port
        self._timeout = timeout

    async def create_or_update(self, *state: Any, **versions: Any) -> Any:
        return await self._ask("create_or_update", *state, **versions)

    async def delete(self, *state: Any) -> Any:
        return await self._ask("delete", *state)

    async def read(self, *key: Any) -> StoredResource | None:
        found = await self._ask("read", *key)
        return None if found is None else StoredResource(**found)

    async def list(self, *page: Any) -> list[StoredResource]:
        return [StoredResource(**found) for found in await self._ask("list", *page)]

    async def _ask(self, name: str, *values: Any, **more: Any) -> Any:
        async with asyncio.timeout(self._timeout):
            reader, writer = await asyncio.open_connection(*self._address)
            try:
                writer.write(json.dumps([name, values, more]).encode() + b"\n")
                answer = await self._line(reader)
            finally:
                writer.close()
        if isinstance(answer, dict) and "error" in answer:
            raise ERRORS[answer["error"]](answer["code"])
        return answer["is"]

    async def _line(self, reader: asyncio.StreamReader) -> Any:
        """What is no whole line of JSON is a connection that failed: a store tells the two kinds of trouble apart."""
        try:
            return json.loads(await reader.readuntil(b"\n"))
        except (EOFError, ValueError, asyncio.LimitOverrunError):
            raise ConnectionError from None


class StorageServer:
    """Serves a SQLite file. What `fault` gives for a call is answered in its place; by default nothing is."""

    def __init__(self, storage: SqliteStorage) -> None:
        self.fault: Callable[[str, list[Any]], dict[str, Any] | None] = lambda name, values: None
        self.serving = 0
        self._storage = storage

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.serving += 1
        with suppress(ConnectionError, EOFError):
            if said := await reader.readline():
                name, values, more = json.loads(said)
                answer = self.fault(name, values) or {"is": _plain(await getattr(self._storage, name)(*values, **more))}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()
        self.serving -= 1


def _plain(found: Any) -> Any:
    if isinstance(found, StoredResource):
        names = ("tenant_id", "resource_type", "resource_id", "content", "version", "fhir_version", "position")
        return {name: getattr(found, name) for name in names}
    return [_plain(each) for each in found] if isinstance(found, list) else found


@asynccontextmanager
async def storage_server(path: Path) -> AsyncIterator[tuple[StorageServer, int]]:
    """A server on a fresh file, and its port."""
    async with SqliteStorage.open(path) as storage:
        server = StorageServer(storage)
        async with await asyncio.start_server(server.serve, "127.0.0.1", 0, limit=2**24) as listening:
            yield server, listening.sockets[0].getsockname()[1]
        await eventually(lambda: not server.serving)
