"""Record: write events and what is owed of them, on the caller's connection, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from sqlalchemy import Connection, CursorResult
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.errors import NotInTransaction
from outbox.event import SyncEvent
from outbox.headers import carrying
from outbox.recording import ANYBODY, Question, is_for_nobody, questions, refuse_nobody, token_of
from outbox.statement import Statement
from outbox.token import SyncToken

if TYPE_CHECKING:
    import asyncpg
    import psycopg

__all__ = ["record", "refuse_autocommit"]

_Way: TypeAlias = Callable[[Any, str, Iterable[Question]], SyncToken | Awaitable[SyncToken]]


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
    kind: Any = type(connection)
    return _way(kind)(connection, schema, questions(chosen, backend_ids))


@cache
def _way(kind: type[Any]) -> _Way:
    # Asked once of each class: what SQLAlchemy's are is asked of abstract classes, and every writer would wait for it.
    if issubclass(kind, Connection):
        return _on_sqlalchemy
    if issubclass(kind, AsyncConnection):
        return _on_async_sqlalchemy
    driver = kind.__module__.partition(".")[0]
    if driver == "asyncpg":
        return _on_asyncpg
    if driver == "psycopg":
        return _on_async_psycopg if hasattr(kind, "__aenter__") else _on_psycopg
    raise TypeError(f"record: takes a SQLAlchemy, asyncpg or psycopg connection, not {kind!r}")


def _on_sqlalchemy(connection: Connection, schema: str, asked: Iterable[Question]) -> SyncToken:
    refuse_autocommit(connection)
    rows: list[Any] = []
    try:
        for question in asked:
            rows += _answer_of_sqlalchemy(connection, schema, *question)
        if is_for_nobody(rows):
            refuse_nobody(_answer_of_sqlalchemy(connection, schema, ANYBODY, {}).all())
    except DBAPIError as error:
        # Its text would quote the parameters, which are content.
        error.hide_parameters = True
        raise
    return token_of(rows)


def _answer_of_sqlalchemy(
    connection: Connection, schema: str, statement: Statement, parameters: dict[str, Any]
) -> CursorResult[Any]:
    # Past SQLAlchemy's compiler, which would take as long as all of ours.
    return connection.exec_driver_sql(*statement.call(schema, connection.dialect.driver, parameters))


async def _on_async_sqlalchemy(connection: AsyncConnection, schema: str, asked: Iterable[Question]) -> SyncToken:
    return await connection.run_sync(_on_sqlalchemy, schema, asked)


def refuse_autocommit(connection: Connection) -> None:
    """Raise `NotInTransaction` when the connection would commit every statement by itself."""
    if getattr(connection.connection.dbapi_connection, "autocommit", False):
        raise _no_transaction()


async def _on_asyncpg(connection: Any, schema: str, asked: Iterable[Question]) -> SyncToken:
    if not connection.is_in_transaction():
        raise _no_transaction()
    rows: list[Any] = []
    for statement, parameters in asked:
        rows += await connection.fetch(*statement.arguments(schema, parameters))
    if is_for_nobody(rows):
        refuse_nobody(await connection.fetch(*ANYBODY.arguments(schema, {})))
    return token_of(rows)


def _on_psycopg(connection: Any, schema: str, asked: Iterable[Question]) -> SyncToken:
    _refuse_idle_autocommit(connection)
    rows: list[Any] = []
    with connection.cursor(row_factory=_tuples) as cursor:
        for statement, parameters in asked:
            rows += cursor.execute(*statement.call(schema, "psycopg", parameters)).fetchall()
        if is_for_nobody(rows):
            refuse_nobody(cursor.execute(*ANYBODY.call(schema, "psycopg", {})).fetchall())
    return token_of(rows)


async def _on_async_psycopg(connection: Any, schema: str, asked: Iterable[Question]) -> SyncToken:
    _refuse_idle_autocommit(connection)
    rows: list[Any] = []
    async with connection.cursor(row_factory=_tuples) as cursor:
        for statement, parameters in asked:
            await cursor.execute(*statement.call(schema, "psycopg", parameters))
            rows += await cursor.fetchall()
        if is_for_nobody(rows):
            await cursor.execute(*ANYBODY.call(schema, "psycopg", {}))
            refuse_nobody(await cursor.fetchall())
    return token_of(rows)


def _tuples(_cursor: Any) -> type[tuple[Any, ...]]:
    # A row factory of psycopg's: whatever the caller has its own rows made into, ours are read by place.
    return tuple


def _refuse_idle_autocommit(connection: Any) -> None:
    # In autocommit only an explicit transaction block carries the event; status 0 is "idle".
    if connection.autocommit and connection.info.transaction_status == 0:
        raise _no_transaction()


def _no_transaction() -> NotInTransaction:
    return NotInTransaction(
        "record: the connection has no transaction open, so the event could be stored without its change; "
        "begin a transaction, write the business rows, then record"
    )
