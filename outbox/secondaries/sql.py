"""A second SQL database as a secondary: PostgreSQL, MariaDB, MySQL or SQLite, through SQLAlchemy.

One table holds every resource, and every write is an upsert that the database itself skips unless its position is
higher. `content is null` marks a tombstone, kept for good: a short row is the price of never forgetting a delete.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from datetime import timedelta
from operator import attrgetter
from typing import Any, TypeVar

import asyncpg
import sqlalchemy as sa
import tenacity
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox.content import content_digest
from outbox.errors import SettingsError, Unavailable
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, ResourceDigest, Retry, Stale

__all__ = ["SqlSecondary"]

_Key = tuple[str, ...]
_Got = TypeVar("_Got")
_Rows = Sequence[sa.Row[*tuple[Any, ...]]]

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_MYSQL = ("mariadb", "mysql")
_KEY = ("tenant_id", "resource_type", "resource_id")
# The guard compares positions and MySQL assigns in this order, so the position comes last.
_STATE = ("content", "version", "fhir_version", "written_at", "position")
_SENT = (*_KEY, *_STATE[:3], "position")
_PAGE = 200
# Keeps the ranges of one query well within what MySQL's range optimizer takes before it reads the whole table.
_KEYS_AT_ONCE = 500
# Keeps a statement full of the largest contents well below the 1 GiB that PostgreSQL takes.
_AT_ONCE = {"insertmanyvalues_page_size": 250}

# What one row can be blamed for: data, integrity, view check, raised by a trigger, program limits. MySQL's numbers
# stand where its SQLSTATE says nothing: wrong value for a field, check violated.
_ROW_AT_FAULT = ("22", "23", "44", "45", "54", "P0", "1366", "3819", "SQLITE_CONSTRAINT", "SQLITE_TOOBIG")
# Serialization failure, deadlock, lock not available; and MySQL's lock wait timeout.
_CONTENDED = ("40001", "40P01", "55P03", "1205")
# What asyncpg raises while connecting reaches us as it is.
_FAILURES = (DBAPIError, PoolTimeout, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)


class SqlSecondary:
    """Keeps the newest state of every resource in one table of another SQL database.

    `engine_or_url` is an `AsyncEngine`, used as it is and yours to dispose (best at READ COMMITTED), or a URL for
    asyncpg, psycopg, asyncmy or aiosqlite. The table is created on first use when it is absent; a `schema` must exist.
    `timeout` bounds one `apply`, and one page of a `scan`. Raises `SettingsError` for names that need quoting, for
    other databases, and for SQLite in memory.
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
        self._engine = _engine(engine_or_url)
        self._is_sqlite = self._engine.dialect.name == "sqlite"
        self._table = _resources(table, schema)
        self._upsert = _upsert(self._table, self._engine.dialect.name)
        self._timeout = timeout.total_seconds()
        self._ready = False

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Upsert the batch in one transaction; a row that the database refuses is `Rejected` alone.

        A batch that meets deadlocks is tried again a few times here, and is `Retry` when that did not help. Raises
        `Unavailable` for everything else that goes wrong.
        """
        if not batch:
            return []
        return await self._run(self._apply(batch))

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order, with a short transaction for every 200 of them."""
        last = after or ""
        while page := await self._live(tenant_id, resource_type, self._table.c.resource_id > last):
            # Digests of large contents take long enough to keep the loop from its heartbeats.
            for seen in await asyncio.to_thread(_digests, page):
                yield seen
            last = page[-1].resource_id

    async def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        found = await self._live(tenant_id, resource_type, self._table.c.resource_id == resource_id)
        return found[0].content if found else None

    async def check(self) -> None:
        """Return when the database answers a query; raise `Unavailable` when it does not."""
        await self._run(self._select(sa.select(1)))

    async def aclose(self) -> None:
        """Close the pool if it was made here; an engine that was given is left alone."""
        if self._owned:
            await self._engine.dispose()

    async def _run(self, work: Coroutine[Any, Any, _Got]) -> _Got:
        """Bound the time, and turn what goes wrong into `Unavailable`, without the driver's words."""
        try:
            async with asyncio.timeout(self._timeout):
                return await (_whole(work) if self._is_sqlite else work)
        except _FAILURES as error:
            # It may come back as another server, or restored: look for the table again.
            self._ready = False
            raise Unavailable(_code(error), "the database did not do what it was asked") from None

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
            code = _code(error)
            if code.startswith(_CONTENDED):
                return [Retry(code, "other writers held the rows")] * len(batch)
            if not code.startswith(_ROW_AT_FAULT):
                raise
            if len(batch) == 1:
                return [Rejected(code, "the database refuses this row")]
        half = len(batch) // 2
        return [*await self._apply(batch[:half]), *await self._apply(batch[half:])]

    @tenacity.retry(
        retry=tenacity.retry_if_exception(lambda error: _code(error).startswith(_CONTENDED)),
        stop=tenacity.stop_after_attempt(5),
        wait=tenacity.wait_random_exponential(multiplier=0.05, max=1),
        reraise=True,
    )
    async def _store(self, batch: Sequence[SyncEvent]) -> list[Outcome]:
        # Relays that meet on the same keys lock them in one order, and so never in a circle.
        rows = [{name: getattr(event, name) for name in _SENT} for event in sorted(batch, key=attrgetter("key"))]
        async with self._engine.begin() as connection:
            result = await connection.execute(self._upsert, rows, execution_options=_AT_ONCE)
            if result.returns_rows:
                # What was neither written nor an error is what the guard skipped.
                written = {tuple(row) for row in result}
                return [Applied() if event.key in written else Stale() for event in batch]
            held = await self._positions(connection, [event.key for event in batch])
        return [_outcome(event, held.get(event.key)) for event in batch]

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

    async def _live(self, tenant_id: str, resource_type: str, condition: sa.ColumnElement[bool]) -> _Rows:
        """Return the first page of what is there and not deleted, in id order."""
        c = self._table.c
        place = (c.tenant_id == tenant_id, c.resource_type == resource_type, c.content.is_not(None))
        page = sa.select(c.resource_id, c.position, c.content).where(*place, condition).order_by(c.resource_id)
        await self._run(self._ensure_table())
        return await self._run(self._select(page.limit(_PAGE)))

    async def _select(self, query: sa.Executable) -> _Rows:
        async with self._engine.connect() as connection:
            return (await connection.execute(query)).fetchall()


class _Bytewise(sa.types.TypeDecorator[str]):
    """Text that is compared and sorted by its UTF-8 bytes, trailing spaces included."""

    impl = sa.String
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TEXT(collation="C"))
        if dialect.name in _MYSQL:
            # Its binary collations ignore trailing spaces, or differ in name between the two.
            return dialect.type_descriptor(mysql.VARBINARY(self.length))
        return dialect.type_descriptor(sa.String())

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | bytes | None:
        return value.encode() if value is not None and dialect.name in _MYSQL else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return value.decode() if value is not None and dialect.name in _MYSQL else value


async def _whole(work: Coroutine[Any, Any, _Got]) -> _Got:
    """Let cancellation wait: what is cut off inside SQLite keeps its file locked until it is collected."""
    working = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.gather(working, return_exceptions=True)
        raise


def _engine(given: AsyncEngine | sa.URL | str) -> AsyncEngine:
    url = given.url if isinstance(given, AsyncEngine) else sa.make_url(given)
    database = url.get_backend_name()
    if database not in ("postgresql", "sqlite", *_MYSQL):
        raise SettingsError("engine_or_url", "must be of PostgreSQL, MariaDB, MySQL or SQLite")
    if database == "sqlite" and url.database in (None, "", ":memory:"):
        raise SettingsError("engine_or_url", "SQLite in memory is lost with its connection; name a file")
    if isinstance(given, AsyncEngine):
        return given
    # SQLite has one writer: in one process they take turns at the pool, not by trying again and again. Elsewhere an
    # upsert at this level waits for other writers, where a higher one would fail or lock the gaps between keys.
    options = {"pool_size": 1, "max_overflow": 0} if database == "sqlite" else {"isolation_level": "READ COMMITTED"}
    return create_async_engine(given, pool_pre_ping=True, hide_parameters=True, **options)


def _resources(name: str, schema: str | None) -> sa.Table:
    for field, value in (("table", name), ("schema", schema or "none")):
        if not _NAME.fullmatch(value):
            raise SettingsError(field, "takes up to 63 ASCII letters, digits and '_', no digit first")
    instant = sa.DateTime(timezone=True).with_variant(mysql.TIMESTAMP(), *_MYSQL)
    long_text = mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin")
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("tenant_id", _Bytewise(64), primary_key=True),
        sa.Column("resource_type", _Bytewise(128), primary_key=True),
        sa.Column("resource_id", _Bytewise(512), primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False),
        sa.Column("version", _Bytewise(128)),
        sa.Column("fhir_version", _Bytewise(16)),
        sa.Column("content", sa.Text().with_variant(long_text, *_MYSQL)),
        sa.Column("written_at", instant, nullable=False, server_default=sa.func.now()),
        schema=schema,
    )


def _upsert(table: sa.Table, database: str) -> sa.Insert:
    """Build the guarded upsert; where the database can, it returns the keys of what it wrote."""
    held = table.c
    now = {"written_at": sa.func.current_timestamp()}
    if database in _MYSQL:
        mine = mysql.insert(table)
        newer = mine.inserted.position > held.position
        new = {**mine.inserted, **now}
        return mine.on_duplicate_key_update([(name, sa.func.if_(newer, new[name], held[name])) for name in _STATE])
    insert: Any = sqlite.insert if database == "sqlite" else postgresql.insert
    other: postgresql.Insert = insert(table)
    new = {**{name: other.excluded[name] for name in _STATE}, **now}
    newer = other.excluded.position > held.position
    upsert = other.on_conflict_do_update(index_elements=_KEY, set_=new, where=newer)
    return upsert.returning(*table.primary_key)


def _outcome(event: SyncEvent, held: int | None) -> Outcome:
    if held is None or held < (event.position or 0):
        return Retry("not_stored", "the database took the row and does not hold it")
    return Applied() if held == event.position else Stale()


def _digests(rows: _Rows) -> list[ResourceDigest]:
    return [ResourceDigest(row[0], row[1], content_digest(row[2])) for row in rows]


def _code(error: BaseException) -> str:
    """Return the SQLSTATE, the driver's number or a word; never a text, as those quote values."""
    if isinstance(error, (TimeoutError, PoolTimeout)):
        return "timeout"
    if isinstance(error, OSError):
        return "refused" if isinstance(error, ConnectionRefusedError) else "unreachable"
    cause = error.orig if isinstance(error, DBAPIError) else error
    for name in ("sqlstate", "sqlite_errorname"):
        code = getattr(cause, name, None)
        if isinstance(code, str) and code != "HY000":
            return code
    number = next(iter(getattr(cause, "args", ())), None)
    return str(number) if isinstance(number, int) else type(cause).__name__
