"""Record: write events and what is owed of them, on the caller's connection, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.errors import NotInTransaction
from outbox.event import SyncEvent
from outbox.headers import carrying
from outbox.recording import recordings, token_of
from outbox.token import SyncToken

if TYPE_CHECKING:
    import asyncpg
    import psycopg

__all__ = ["record", "refuse_autocommit"]


@overload
def record(
    connection: Connection | psycopg.Connection[Any],
    events: SyncEvent | Iterable[SyncEvent],
    *,
    schema: str = "public",
    backend_ids: Sequence[str] | None = None,
) -> SyncToken: ...


@overload
def record(
    connection: AsyncConnection | asyncpg.Connection[Any] | psycopg.AsyncConnection[Any],
    events: SyncEvent | Iterable[SyncEvent],
    *,
    schema: str = "public",
    backend_ids: Sequence[str] | None = None,
) -> Awaitable[SyncToken]: ...


def record(
    connection: Any,
    events: SyncEvent | Iterable[SyncEvent],
    *,
    schema: str = "public",
    backend_ids: Sequence[str] | None = None,
) -> SyncToken | Awaitable[SyncToken]:
    """Write events and their deliveries on `connection`; return a token that says which, and to whom they are owed.

    `connection` is a raw SQLAlchemy, asyncpg or psycopg connection with a transaction open; call this **after** the
    business rows were written, so that the row locks put the events of one key in commit order. The async kinds
    return an awaitable. One statement carries up to 1,000 events; positions rise in the order given. `backend_ids`
    limits who is owed. Once the transaction has committed, the token can be waited on.

    Raises `NotInTransaction` before any SQL when the connection would commit by itself, and `NoSecondary` when no
    secondary was ever registered, because then nobody would get the events.
    """
    chosen = carrying([events] if isinstance(events, SyncEvent) else events)
    if isinstance(connection, Connection):
        return _record_on_sqlalchemy(connection, chosen, schema, backend_ids)
    if isinstance(connection, AsyncConnection):
        return connection.run_sync(_record_on_sqlalchemy, chosen, schema, backend_ids)
    return _record_on_driver(connection, chosen, schema, backend_ids)


def _record_on_sqlalchemy(
    connection: Connection, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    refuse_autocommit(connection)
    rows: list[Any] = []
    for statement, parameters in recordings(events, backend_ids):
        try:
            # Past SQLAlchemy's compiler, which would take as long as all of ours.
            rows += connection.exec_driver_sql(*statement.call(schema, connection.dialect.driver, parameters))
        except DBAPIError as error:
            # Its text would quote the parameters, which are content.
            error.hide_parameters = True
            raise
    return token_of(rows)


def refuse_autocommit(connection: Connection) -> None:
    """Raise `NotInTransaction` when the connection would commit every statement by itself."""
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise _no_transaction()


def _record_on_driver(
    connection: Any, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken | Awaitable[SyncToken]:
    kind = type(connection).__module__.partition(".")[0]
    if kind == "asyncpg":
        return _record_on_asyncpg(connection, events, schema, backend_ids)
    if kind != "psycopg":
        raise TypeError(f"record: takes a SQLAlchemy, asyncpg or psycopg connection, not {type(connection)!r}")
    if hasattr(connection, "__aenter__"):
        return _record_on_async_psycopg(connection, events, schema, backend_ids)
    _refuse_idle_autocommit(connection)
    rows: list[Any] = []
    for statement, parameters in recordings(events, backend_ids):
        cursor = connection.execute(*statement.call(schema, "psycopg", parameters))
        rows += cursor.fetchall()
    return token_of(rows)


async def _record_on_asyncpg(
    connection: Any, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    if not connection.is_in_transaction():
        raise _no_transaction()
    rows: list[Any] = []
    for statement, parameters in recordings(events, backend_ids):
        rows += await connection.fetch(*statement.arguments(schema, parameters))
    return token_of(rows)


async def _record_on_async_psycopg(
    connection: Any, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    _refuse_idle_autocommit(connection)
    rows: list[Any] = []
    for statement, parameters in recordings(events, backend_ids):
        cursor = await connection.execute(*statement.call(schema, "psycopg", parameters))
        rows += await cursor.fetchall()
    return token_of(rows)


def _refuse_idle_autocommit(connection: Any) -> None:
    # In autocommit only an explicit transaction block carries the event; status 0 is "idle".
    if connection.autocommit and connection.info.transaction_status == 0:
        raise _no_transaction()


def _no_transaction() -> NotInTransaction:
    return NotInTransaction(
        "record: the connection has no transaction open, so the event could be stored without its change; "
        "begin a transaction, write the business rows, then record"
    )
