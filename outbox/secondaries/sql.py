"""A second SQL database as a secondary: PostgreSQL, MariaDB, MySQL or SQLite, through SQLAlchemy.

One table holds every resource, and every write is an upsert that the database itself skips unless its position is
higher. `content is null` marks a tombstone, kept for good: a short row is the price of never forgetting a delete.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from operator import attrgetter
from typing import Any, TypeVar
from uuid import uuid4

import sqlalchemy as sa
import tenacity
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.errors import Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Stale, Summary
from outbox.secondaries.sql_digest import digests, live, summary, summing, within
from outbox.secondaries.sql_engine import engine_of
from outbox.secondaries.sql_failure import FAILURES, code_of, is_contention, is_fault_of_a_row, is_locked, is_overtime
from outbox.secondaries.sql_table import KEY, SENT, guarded_upsert, resources_table

__all__ = ["SqlSecondary"]

_Key = tuple[str, ...]
_Got = TypeVar("_Got")
_Rows = Sequence[sa.Row[*tuple[Any, ...]]]

_PAGE = 200
# Keeps the ranges of one query well within what MySQL's range optimizer takes before it reads the whole table.
_KEYS_AT_ONCE = 500
# Keeps a statement full of the largest contents well below the 1 GiB that PostgreSQL takes.
_AT_ONCE = {"insertmanyvalues_page_size": 250}
_HELD = "other writers held the row"
_TOO_LONG = Retry("timeout", "no end in time, though the database answers")


class SqlSecondary:
    """Keeps the newest state of every resource in one table of another SQL database.

    `engine_or_url` is an `AsyncEngine`, used as it is and yours to dispose (best at READ COMMITTED), or a URL for
    asyncpg, psycopg, asyncmy or aiosqlite. The table is created on first use when it is absent; a `schema` must exist.
    `timeout` bounds one `apply`, one page of a `scan`, and one of the statements that answer anything else. Raises
    `SettingsError` for names that need quoting, for other databases, and for SQLite in memory.
    """

    def __init__(
        self,
        backend_id: str,
        engine_or_url: AsyncEngine | sa.URL | str,
        table: str = "outbox_resources",
        schema: str | None = None,
        *,
        timeout: timedelta = timedelta(seconds=30),
    ) -> None:
        self.backend_id = backend_id
        self._owned = not isinstance(engine_or_url, AsyncEngine)
        self._engine = engine_of(engine_or_url, timeout)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._table = resources_table(table, schema)
        self._upsert = guarded_upsert(self._table, self._engine.dialect.name)
        self._timeout = timeout.total_seconds()
        self._ready = False

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Upsert the batch in one transaction; a row that the database refuses is `Rejected` alone.

        A batch that meets deadlocks is tried again a few times here, then in halves: a row that still does is `Retry`
        alone. When time runs out though the database takes writes, the batch is `Retry`, so that its rows go one by one
        and the row that somebody keeps locked is found. Raises `Unavailable` for everything else that goes wrong.
        """
        if not batch:
            return []
        try:
            outcomes = await self._run(self._apply(batch))
        except Unavailable as error:
            if error.code != "timeout":
                raise
            outcomes = [_TOO_LONG] * len(batch)
        if all(isinstance(outcome, Retry) for outcome in outcomes):
            # What keeps every row out may be none of them: a lock on the whole table, a standby that is waited for.
            await self.check()
        return outcomes

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order, with a short transaction for every 200 of them."""
        async for page in self._pages(tenant_id, resource_type, after, None):
            # Digests of large contents take long enough to keep the loop from its heartbeats.
            for seen in await asyncio.to_thread(digests, page):
                yield seen

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live, from a short transaction for every 200 of them."""
        found: list[ResourceDigest] = []
        names = list(dict.fromkeys(resource_ids))
        for start in range(0, len(names), _PAGE):
            some = self._table.c.resource_id.in_(names[start : start + _PAGE])
            found += await asyncio.to_thread(digests, await self._page(tenant_id, resource_type, some))
        return found

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with a live resource, by steps along the primary key.

        Takes as many queries as there are of them, and tombstones are passed one by one; no content is read.
        """
        c = self._table.c
        found: list[tuple[str, str]] = []
        ranges: Sequence[sa.ColumnElement[bool]] = [sa.true()]
        while scope := await self._first_scope(ranges):
            found.append(scope)
            tenant_id, resource_type = scope
            ranges = [sa.and_(c.tenant_id == tenant_id, c.resource_type > resource_type), c.tenant_id > tenant_id]
        return found

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        """Return the summary of a range: one statement, within which the database reads and hashes every content.

        SQLite, which cannot hash, is read page by page instead.
        """
        if self._is_sqlite:
            return await self._summed_here(tenant_id, resource_type, after, through)
        query = summing(self._table, self._engine.dialect.name)
        query = query.where(live(self._table, tenant_id, resource_type), within(self._table, after, through))
        [(count, total)] = await self._read(query)
        if (total or 0) < 0:
            raise Unavailable("unreadable_content", "the database could not hash every content")
        return Summary(count, int(total or 0))

    async def highest_position(self) -> int:
        """Return the highest position held, deletes included; 0 when nothing is held.

        One look at an index. A table that was made without it (`position`) is read as a whole, within `timeout`.
        """
        [(highest,)] = await self._read(sa.select(sa.func.max(self._table.c.position)))
        return int(highest or 0)

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        found = await self._page(tenant_id, resource_type, self._table.c.resource_id == resource_id)
        return found[0].content if found else None

    async def check(self) -> None:
        """Return when the database takes a write and commits it, of which nothing is left; else raise `Unavailable`."""
        await self._run(self._ensure_table())
        await self._run(self._try_a_write())

    async def aclose(self) -> None:
        """Close the pool if it was made here; an engine that was given is left alone."""
        if self._owned:
            await self._engine.dispose()

    async def _run(self, work: Coroutine[Any, Any, _Got]) -> _Got:
        """Bound the time, and turn what goes wrong into `Unavailable`, without the driver's words."""
        try:
            async with asyncio.timeout(self._timeout):
                return await (_whole(work) if self._is_sqlite else work)
        except FAILURES as error:
            # It may come back as another server, or restored: look for the table again.
            self._ready = False
            code = "timeout" if is_overtime(error) else code_of(error)
            raise Unavailable(code, "the database did not do what it was asked") from None

    # Twice, as another process may create the table between our look and our statement.
    @tenacity.retry(
        retry=tenacity.retry_if_exception_type(DBAPIError), stop=tenacity.stop_after_attempt(2), reraise=True
    )
    async def _ensure_table(self) -> None:
        if not self._ready:
            async with self._engine.begin() as connection:
                await connection.run_sync(self._table.create, checkfirst=True)
        self._ready = True

    async def _apply(self, batch: Sequence[SyncEvent]) -> list[Outcome]:
        """Store the batch; when one row spoils it, halve it until that row stands alone."""
        await self._ensure_table()
        try:
            return await self._store(batch)
        except DBAPIError as error:
            contended = is_contention(error)
            if not contended and not is_fault_of_a_row(error):
                raise
            if len(batch) == 1:
                code = code_of(error)
                return [Retry(code, _HELD) if contended else Rejected(code, "the database refuses this row")]
        half = len(batch) // 2
        return [*await self._apply(batch[:half]), *await self._apply(batch[half:])]

    @tenacity.retry(
        retry=tenacity.retry_if_exception(is_contention),
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
        reraise=True,
    )
    async def _store(self, batch: Sequence[SyncEvent]) -> list[Outcome]:
        # Relays that meet on the same keys lock them in one order, and so never in a circle.
        rows = [{name: getattr(event, name) for name in SENT} for event in sorted(batch, key=attrgetter("key"))]
        async with self._writing() as connection:
            result = await connection.execute(self._upsert, rows, execution_options=_AT_ONCE)
            if result.returns_rows:
                # What was neither written nor an error is what the guard skipped.
                written = {tuple(row) for row in result}
                return [Applied() if event.key in written else Stale() for event in batch]
            held = await self._positions(connection, [event.key for event in batch])
        return [_outcome(event, held.get(event.key)) for event in batch]

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction, on a connection that is not used again when the database refuses for its own reasons."""
        async with self._engine.begin() as connection:
            try:
                yield connection
            except DBAPIError as error:
                # What a session may do can be settled when it begins; after a grant, only a new one may do it.
                if not (self._is_sqlite or is_contention(error) or is_fault_of_a_row(error)):
                    await connection.invalidate()
                raise

    async def _positions(self, connection: AsyncConnection, keys: Sequence[_Key]) -> dict[_Key, int]:
        """Read what MySQL holds: it cannot return what it wrote, and its row counts do not tell."""
        key = tuple(self._table.primary_key)
        held = sa.select(*key, self._table.c.position)
        positions: dict[_Key, int] = {}
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            some = sa.tuple_(*key).in_(keys[start : start + _KEYS_AT_ONCE])
            for *found, position in await connection.execute(held.where(some)):
                positions[tuple(found)] = position
        return positions

    async def _pages(
        self, tenant_id: str, resource_type: str, after: str | None, through: str | None
    ) -> AsyncIterator[_Rows]:
        while page := await self._page(tenant_id, resource_type, within(self._table, after, through)):
            yield page
            after = page[-1].resource_id

    async def _page(self, tenant_id: str, resource_type: str, condition: sa.ColumnElement[bool]) -> _Rows:
        """Return the first page of what is there and not deleted, in id order."""
        c = self._table.c
        page = sa.select(c.resource_id, c.position, c.content).where(live(self._table, tenant_id, resource_type))
        return await self._read(page.where(condition).order_by(c.resource_id).limit(_PAGE))

    async def _first_scope(self, ranges: Sequence[sa.ColumnElement[bool]]) -> tuple[str, str] | None:
        """Return where the first live resource lies, in the first of the ranges that has one."""
        c = self._table.c
        first = sa.select(c.tenant_id, c.resource_type).where(c.content.is_not(None)).order_by(*self._table.primary_key)
        for condition in ranges:
            for tenant_id, resource_type in await self._read(first.where(condition).limit(1)):
                return tenant_id, resource_type
        return None

    async def _summed_here(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        count = total = 0
        async for page in self._pages(tenant_id, resource_type, after, through):
            part = await asyncio.to_thread(summary, page)
            count, total = count + part.count, total + part.total
        return Summary(count, total)

    async def _read(self, query: sa.Executable) -> _Rows:
        await self._run(self._ensure_table())
        return await self._run(self._select(query))

    async def _try_a_write(self) -> None:
        """Write a row whose key no event can have, take it back, and commit: that waits for all that a commit does."""
        row = dict.fromkeys(SENT) | dict.fromkeys(KEY, "") | {"resource_id": uuid4().hex, "position": 0}
        async with self._engine.begin() as connection:
            to_take_back = await connection.begin_nested()
            try:
                await connection.execute(self._table.insert(), row)
            except DBAPIError as error:
                # Whoever says that a row breaks a rule, or that another was quicker, takes writes.
                if is_locked(error) or not (is_fault_of_a_row(error) or is_contention(error)):
                    raise
            await to_take_back.rollback()

    async def _select(self, query: sa.Executable) -> _Rows:
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).fetchall()


async def _whole(work: Coroutine[Any, Any, _Got]) -> _Got:
    """Let cancellation wait: what is cut off inside SQLite keeps its file locked until it is collected."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise


def _outcome(event: SyncEvent, held: int | None) -> Outcome:
    if held is None or held < (event.position or 0):
        return Retry("not_stored", "the database took the row and does not hold it")
    return Applied() if held == event.position else Stale()
