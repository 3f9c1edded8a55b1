# ruff: noqa: INP001 - an example to copy, not a package
"""A resource store over SQLite, as an application may have one, with the position that makes it a secondary.

Without `position`, and with a `delete` that deletes, it was a store like many others. It fits
`outbox.ResourceStorage` by its methods alone, and knows of outbox only the errors it raises.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosqlite

from outbox import ResourceRefused, StoredResource, Unavailable

__all__ = ["SqliteStorage"]

# Content is null where a resource was deleted. SQLite compares text by its bytes, which in UTF-8 is the order we need.
TABLE = """
create table if not exists resource (
    tenant_id text not null,
    resource_type text not null,
    resource_id text not null,
    content text,
    version text,
    fhir_version text,
    position integer not null default 0,
    primary key (tenant_id, resource_type, resource_id)
)
"""

CREATE = """
insert into resource (tenant_id, resource_type, resource_id, content, version, fhir_version, position)
values (?, ?, ?, ?, ?, ?, ?)
on conflict (tenant_id, resource_type, resource_id) do update
set content = excluded.content, version = excluded.version,
    fhir_version = excluded.fhir_version, position = excluded.position
where excluded.position > resource.position and resource.content is null
"""

UPSERT = """
insert into resource (tenant_id, resource_type, resource_id, content, version, fhir_version, position)
values (?, ?, ?, ?, ?, ?, ?)
on conflict (tenant_id, resource_type, resource_id) do update
set content = excluded.content, version = excluded.version,
    fhir_version = excluded.fhir_version, position = excluded.position
where excluded.position > resource.position
"""

READ = """
select tenant_id, resource_type, resource_id, content, version, fhir_version, position
from resource
where tenant_id = ? and resource_type = ? and resource_id = ? and content is not null
"""

COUNT = """
select count(*) from resource
where tenant_id = ? and resource_type = coalesce(?, resource_type) and content is not null
"""

LIST = """
select tenant_id, resource_type, resource_id, content, version, fhir_version, position
from resource
where tenant_id = ? and resource_type = ? and resource_id > ? and content is not null
order by resource_id
limit ?
"""

FIELDS = ("tenant_id", "resource_type", "resource_id", "content", "version", "fhir_version", "position")


class SqliteStorage:
    """Keeps resources in one table of a SQLite file."""

    def __init__(self, database: aiosqlite.Connection) -> None:
        self._database = database

    @classmethod
    @asynccontextmanager
    async def open(cls, path: str | Path) -> AsyncIterator[SqliteStorage]:
        """Open a file, which is made if it is absent, until the end of the block."""
        # Each statement is its own transaction, so that none is left open when a call is cancelled.
        async with aiosqlite.connect(path, isolation_level=None) as database:
            await database.execute("pragma journal_mode = wal")
            await database.execute(TABLE)
            yield cls(database)

    async def create(
        self,
        tenant_id: str,
        resource_type: str,
        resource_id: str,
        content: str,
        position: int,
        *,
        version: str | None = None,
        fhir_version: str | None = None,
    ) -> bool:
        """Store a resource that is not there."""
        return await self._write(
            CREATE, tenant_id, resource_type, resource_id, content, version, fhir_version, position
        )

    async def create_or_update(
        self,
        tenant_id: str,
        resource_type: str,
        resource_id: str,
        content: str,
        position: int,
        *,
        version: str | None = None,
        fhir_version: str | None = None,
    ) -> bool:
        """Store a resource, unless the position held is as high."""
        return await self._write(
            UPSERT, tenant_id, resource_type, resource_id, content, version, fhir_version, position
        )

    async def read(self, tenant_id: str, resource_type: str, resource_id: str) -> StoredResource | None:
        """Return a resource, None when it is absent or deleted."""
        found = await self._resources(READ, tenant_id, resource_type, resource_id)
        return found[0] if found else None

    async def delete(self, tenant_id: str, resource_type: str, resource_id: str, position: int) -> bool:
        """Delete a resource and remember at which position, unless the position held is as high."""
        return await self._write(UPSERT, tenant_id, resource_type, resource_id, None, None, None, position)

    async def count(self, tenant_id: str, resource_type: str | None = None) -> int:
        """Return how many resources there are."""
        async with _explained():
            [(number,)] = await self._database.execute_fetchall(COUNT, (tenant_id, resource_type))
        return int(number)

    async def list(self, tenant_id: str, resource_type: str, after: str, limit: int) -> Sequence[StoredResource]:
        """Return the resources with the next ids."""
        return await self._resources(LIST, tenant_id, resource_type, after, limit)

    async def _write(self, statement: str, *values: str | int | None) -> bool:
        async with _explained():
            cursor = await self._database.execute(statement, values)
        return cursor.rowcount == 1

    async def _resources(self, query: str, *values: str | int) -> Sequence[StoredResource]:
        async with _explained():
            rows = await self._database.execute_fetchall(query, values)
        return [_resource(row) for row in rows]


@asynccontextmanager
async def _explained() -> AsyncIterator[None]:
    """Say of each error whether it is about the resource or about the file, in codes: texts may quote values."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.DataError) as error:
        raise ResourceRefused(error.sqlite_errorname, "the table does not take this resource") from None
    except sqlite3.OperationalError as error:
        raise Unavailable(error.sqlite_errorname, "the file cannot be read or written") from None


def _resource(row: Any) -> StoredResource:
    return StoredResource(**dict(zip(FIELDS, row, strict=True)))
