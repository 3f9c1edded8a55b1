"""Listing: the resources of one tracked class and tenant, in the order of the id's UTF-8 bytes, page by page.

Both sides of a comparison must sort alike, whatever collation the primary's column has. A column that sorts by bytes
anyway is walked along its index. For any other the database sorts the ids once, into a cursor that outlives its
transaction, and rows are fetched by id; so there is no long transaction and no sort per page. What is no column is
sorted in memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import unquote
from uuid import UUID

import msgspec
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    SmallInteger,
    String,
    Text,
    Uuid,
    cast,
    false,
    inspect,
    select,
    text,
    tuple_,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import QueryableAttribute, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.expression import Executable
from sqlalchemy.types import TypeEngine

from outbox.capture import Tracked, identity_of
from outbox.content import content_digest, fingerprint
from outbox.statement import Statement

__all__ = ["SORTS_BY_BYTES", "Listing", "PrimaryRow", "closed", "identified", "of_tenant", "rows_of", "sorts_by_bytes"]

# The builtin provider sorts by code point in all its locales, which for UTF-8 is the order of the bytes.
SORTS_BY_BYTES = Statement("""
select case sorting.collname
           when 'default' then database.datlocprovider = 'b' or database.datcollate in ('C', 'POSIX')
                               and database.datlocprovider = 'c'
           else sorting.collprovider = 'b' or sorting.collcollate in ('C', 'POSIX') and sorting.collprovider = 'c'
       end and kind.typname in ('text', 'varchar')
from pg_attribute as attribute
join pg_type as kind on kind.oid = attribute.atttypid
join pg_collation as sorting on sorting.oid = attribute.attcollation
cross join pg_database as database
where database.datname = current_database()
  and attribute.attrelid = to_regclass(:table) and attribute.attname = :column
""")


_T = TypeVar("_T")


@asynccontextmanager
async def closed(listing: AsyncIterator[_T]) -> AsyncIterator[AsyncIterator[_T]]:
    """Close a listing with whoever walks it, also where they leave early: it may hold a connection.

    Left to the collector it would give that back some time later, when its pool may be gone. One that is no generator
    has nothing to close.
    """
    try:
        yield listing
    finally:
        if isinstance(listing, AsyncGenerator):
            await listing.aclose()


class PrimaryRow(msgspec.Struct, frozen=True):
    """One resource as the primary holds it now, with the JSON text that an event of it would carry."""

    resource_id: str
    content: str

    @property
    def digest(self) -> str:
        """The digest of the canonical form."""
        return content_digest(self.content)

    @property
    def fingerprint(self) -> int:
        """What the row adds to the summary of its range."""
        return fingerprint(self.resource_id, self.content)


class Listing:
    """Lists one tracked class for one tenant."""

    def __init__(
        self, engine: AsyncEngine, tracked: Tracked, tenant_id: str, is_of: Callable[[Tracked, Any], bool], page: int
    ) -> None:
        self._engine = engine
        self._tracked = tracked
        self._tenant_id = tenant_id
        self._is_of = is_of
        self._page = page

    async def pages(self, after: str | None = None, through: str | None = None) -> AsyncIterator[list[PrimaryRow]]:
        """Yield what lies above `after` and up to `through`, in bounded pages."""
        column = self._tracked.resource_id_column
        if column is None:
            pages = self._sorted_here()
        elif await sorts_by_bytes(self._engine, column):
            pages = self._along(column, after)
        else:
            pages = self._sorted_there(column)
        async with closed(pages) as found:
            async for page in found:
                kept = [row for row in page if _within(row, after, through)]
                if kept:
                    yield kept
                if through is not None and page and page[-1].resource_id.encode() > through.encode():
                    return

    async def _along(self, column: QueryableAttribute[Any], after: str | None) -> AsyncIterator[list[PrimaryRow]]:
        last = after
        while True:
            statement = self._rows().order_by(column).limit(self._page)
            rows, page = await self._read(statement if last is None else statement.where(column > last))
            if not rows:
                return
            yield page
            last = self._tracked.resource_id(rows[-1])

    async def _sorted_there(self, column: QueryableAttribute[Any]) -> AsyncIterator[list[PrimaryRow]]:
        keys = of_tenant(select(column), self._tracked, self._tenant_id).order_by(cast(column, Text).collate("C"))
        fetch = text(f"fetch forward {self._page} from outbox_keys")
        async with self._engine.connect() as connection:
            await connection.execute(_Held(keys))
            await connection.commit()
            try:
                while found := (await connection.scalars(fetch)).all():
                    await connection.commit()
                    _, page = await self._read(self._rows().where(column.in_(found)))
                    yield _by_bytes(page)
            finally:
                if not connection.invalidated:
                    # What failed may have left a transaction in which no cursor can be closed.
                    await connection.rollback()
                    await connection.execute(text("close outbox_keys"))
                    await connection.commit()

    async def _sorted_here(self) -> AsyncIterator[list[PrimaryRow]]:
        async with AsyncSession(self._engine) as session:
            found = await session.run_sync(self._load_all)
        found = await asyncio.to_thread(_by_bytes, found)
        for start in range(0, len(found), self._page):
            yield found[start : start + self._page]

    def _rows(self) -> Select[Any]:
        return of_tenant(select(self._tracked.entity), self._tracked, self._tenant_id)

    def _resources(self, objects: Iterable[Any]) -> list[PrimaryRow]:
        return rows_of(self._tracked, self._tenant_id, [each for each in objects if self._is_of(self._tracked, each)])

    async def _read(self, statement: Select[Any]) -> tuple[Sequence[Any], list[PrimaryRow]]:
        async with AsyncSession(self._engine) as session:
            return await session.run_sync(self._load, statement)

    def _load(self, session: Session, statement: Select[Any]) -> tuple[Sequence[Any], list[PrimaryRow]]:
        """Return objects and the resources they are, told while the session is there for what a content loads."""
        rows = session.scalars(statement).unique().all()
        return rows, self._resources(rows)

    def _load_all(self, session: Session) -> list[PrimaryRow]:
        pages = session.scalars(self._rows().execution_options(yield_per=self._page)).partitions()
        return [row for page in pages for row in self._resources(page)]


def of_tenant(statement: Select[Any], tracked: Tracked, tenant_id: str) -> Select[Any]:
    """Narrow a statement to a tenant, where a column or a constant says which it is."""
    column = tracked.tenant_column
    if isinstance(column, str):
        return statement if column == tenant_id else statement.where(false())
    return statement if column is None else statement.where(column == tenant_id)


def rows_of(tracked: Tracked, tenant_id: str, objects: Iterable[Any]) -> list[PrimaryRow]:
    """Return the resources that objects are; those of other tenants are left out."""
    return [
        PrimaryRow(tracked.resource_id(each), tracked.text(each))
        for each in objects
        if tracked.tenant(each) == tenant_id
    ]


def identified(tracked: Tracked, resource_ids: Sequence[str]) -> ColumnElement[bool] | None:
    """Return the condition that finds resources by id along an index; None where only the objects can tell."""
    column = tracked.resource_id_column
    if column is not None:
        read = _reader(column.type)
        return (
            None if read is None else column.in_([value for name in resource_ids if (value := read(name)) is not None])
        )
    if tracked.resource_id is not identity_of:
        return None
    columns = inspect(tracked.entity).primary_key
    readers = [_reader(column.type) for column in columns]
    if None in readers:
        return None
    keys = [_parts(name, readers) for name in resource_ids]
    return tuple_(*columns).in_([key for key in keys if key is not None])


async def sorts_by_bytes(engine: AsyncEngine, column: QueryableAttribute[Any]) -> bool:
    """Whether the index of a text column is in the order of the UTF-8 bytes."""
    stored = column.property.columns[0]
    table = engine.dialect.identifier_preparer.format_table(stored.table)
    async with engine.connect() as connection:
        found = await connection.scalar(text(SORTS_BY_BYTES.sql), {"table": table, "column": stored.name})
    return bool(found)


class _Held(Executable, ClauseElement):
    """Declares the cursor `outbox_keys` over a query; at the commit the server keeps its rows, and no snapshot."""

    inherit_cache = False

    def __init__(self, query: Select[Any]) -> None:
        self.query = query


@compiles(_Held)
def _declared(element: _Held, compiler: SQLCompiler, **options: Any) -> str:
    return f"declare outbox_keys cursor with hold for {compiler.process(element.query, **options)}"


def _reader(kind: TypeEngine[Any]) -> Callable[[str], Any] | None:
    """Return what turns an id's text back into the column's value, and into None what is no such text."""
    if isinstance(kind, Integer):
        bits = 63 if isinstance(kind, BigInteger) else 15 if isinstance(kind, SmallInteger) else 31
        return lambda name: _number(name, bits)
    if isinstance(kind, Uuid) and kind.as_uuid:
        return _uuid
    return str if isinstance(kind, String) else None


def _number(name: str, bits: int) -> int | None:
    if not name.removeprefix("-").isascii() or not name.removeprefix("-").isdecimal() or len(name) > 20:
        return None
    number = int(name)
    return number if str(number) == name and -(2**bits) <= number < 2**bits else None


def _uuid(name: str) -> UUID | None:
    try:
        found = UUID(name)
    except ValueError:
        return None
    return found if str(found) == name else None


def _parts(name: str, readers: Sequence[Callable[[str], Any] | None]) -> tuple[Any, ...] | None:
    parts = [unquote(part) for part in name.split("/")]
    if len(parts) != len(readers):
        return None
    values = tuple(read(part) for read, part in zip(readers, parts, strict=True) if read is not None)
    return None if None in values else values


def _within(row: PrimaryRow, after: str | None, through: str | None) -> bool:
    above = after is None or row.resource_id.encode() > after.encode()
    return above and (through is None or row.resource_id.encode() <= through.encode())


def _by_bytes(rows: list[PrimaryRow]) -> list[PrimaryRow]:
    return sorted(rows, key=lambda row: row.resource_id.encode())
