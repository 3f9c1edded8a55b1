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

import msgspec
from sqlalchemy import Select, Text, cast, func, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import QueryableAttribute, Session
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.elements import ClauseElement
from sqlalchemy.sql.expression import Executable

from outbox.capture import Tracked
from outbox.content import fingerprint
from outbox.errors import InvalidEvent
from outbox.narrowing import holding, of_tenant, tells_tenants
from outbox.secondaries.reading import digest_of
from outbox.statement import Statement

__all__ = ["SORTS_BY_BYTES", "Listing", "PrimaryRow", "closed", "rows_of", "sorts_by_bytes"]

# The builtin provider sorts by code point in all its locales, which for UTF-8 is the order of the bytes. A null sorts
# behind everything, and not where the text does that it is called; a promise that was not validated rules out none.
SORTS_BY_BYTES = Statement("""
select case sorting.collname
           when 'default' then database.datlocprovider = 'b' or database.datcollate in ('C', 'POSIX')
                               and database.datlocprovider = 'c'
           else sorting.collprovider = 'b' or sorting.collcollate in ('C', 'POSIX') and sorting.collprovider = 'c'
       end and kind.typname in ('text', 'varchar') and attribute.attnotnull and not exists (
           select from pg_constraint as promise
           where promise.conrelid = attribute.attrelid and attribute.attnum = any (promise.conkey)
             and promise.contype = 'n' and not promise.convalidated
       )
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
    """One resource as the primary holds it now, with the JSON text that an event of it would carry, if one can."""

    resource_id: str
    content: str | None

    @property
    def digest(self) -> str | None:
        """The digest of the canonical form; None, which no secondary's is, where there is none."""
        return None if self.content is None else digest_of(self.content) or None

    @property
    def fingerprint(self) -> int:
        """What the row adds to the summary of its range: as in SQL nothing, where there is no text."""
        return 0 if self.content is None else fingerprint(self.resource_id, self.content)


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
        self._tenant_values: list[Any] | None = None

    async def pages(self, after: str | None = None, through: str | None = None) -> AsyncIterator[list[PrimaryRow]]:
        """Yield what lies above `after` and up to `through`, in bounded pages."""
        self._tenant_values = await self._find_tenant()
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
        name = func.coalesce(cast(column, Text), str(None))
        keys = self._of_tenant(select(column)).order_by(name.collate("C"))
        fetch = text(f"fetch forward {self._page} from outbox_keys").columns(literal_column("id", column.type))
        async with self._engine.connect() as connection:
            await connection.execute(_Held(keys))
            await connection.commit()
            try:
                while found := (await connection.scalars(fetch)).all():
                    await connection.commit()
                    _, page = await self._read(self._rows().where(holding(column, found)))
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

    async def _find_tenant(self) -> list[Any] | None:
        """Return what the tenant's column holds of it, where its text does not tell; None where it does."""
        column = self._tracked.tenant_column
        if not isinstance(column, QueryableAttribute) or tells_tenants(self._tracked):
            return None
        async with AsyncSession(self._engine) as session:
            found = await session.scalars(select(column).distinct())
            return [value for value in found if str(value) == self._tenant_id]

    def _of_tenant(self, statement: Select[Any]) -> Select[Any]:
        return of_tenant(statement, self._tracked, self._tenant_id, self._tenant_values)

    def _rows(self) -> Select[Any]:
        return self._of_tenant(select(self._tracked.entity))

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


def rows_of(tracked: Tracked, tenant_id: str, objects: Iterable[Any]) -> list[PrimaryRow]:
    """Return the resources that objects are; those of other tenants are left out."""
    return [
        PrimaryRow(tracked.resource_id(each), _text(tracked, each))
        for each in objects
        if tracked.tenant(each) == tenant_id
    ]


def _text(tracked: Tracked, row: Any) -> str | None:
    """Return the text that an event of a row carries; None for what is no Unicode, no JSON, or no object."""
    try:
        content = tracked.text(row)
        content.encode()
    except (InvalidEvent, UnicodeEncodeError):
        return None
    return content if content.lstrip().startswith("{") else None


async def sorts_by_bytes(engine: AsyncEngine, column: QueryableAttribute[Any]) -> bool:
    """Whether the index of a text column is in the order of the UTF-8 bytes of what its values are called."""
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


def _within(row: PrimaryRow, after: str | None, through: str | None) -> bool:
    above = after is None or row.resource_id.encode() > after.encode()
    return above and (through is None or row.resource_id.encode() <= through.encode())


def _by_bytes(rows: list[PrimaryRow]) -> list[PrimaryRow]:
    return sorted(rows, key=lambda row: row.resource_id.encode())
