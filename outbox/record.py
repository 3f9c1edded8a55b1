"""Record: write events and what is owed of them, on the caller's connection, inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, overload

from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.errors import NoSecondary, NotInTransaction
from outbox.event import SyncEvent
from outbox.headers import carrying
from outbox.schema import STAMP
from outbox.statement import Statement, dialect_of
from outbox.token import SyncToken

if TYPE_CHECKING:
    import asyncpg
    import psycopg

__all__ = ["RECORD", "RECORD_ONE", "record", "refuse_autocommit"]

# Whom the registry names, as the statement that records sees it.
_REGISTERED = """from {schema}.outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast(:backend_ids as text[]) is null or secondary.backend_id = any (cast(:backend_ids as text[])))"""
_WANTS = """(secondary.tenant_ids is null or [tenant_id] = any (secondary.tenant_ids))
      and (secondary.resource_types is null or [resource_type] = any (secondary.resource_types))"""

_ANSWER = """
select event_id, owed_to, cast(cast(transaction_id as text) as bigint) as transaction_id, stamp,
       owed_to <> '{}' or exists (select from {schema}.outbox_secondary) as anybody
from event
"""

# The transaction gets its id before it draws a position: whoever reads the sequence and then the running
# transactions has seen every writer that may still commit a lower position. Positions are drawn in the
# order given, and rows are counted back without RETURNING, so an insert-only role can record. The registry is read once
# and not for every row: its rows change every second, and where vacuum is held up it is long.
RECORD = Statement(
    """
with writer as materialized (
    select pg_current_xact_id() as transaction_id, [stamp] as stamp
), secondary as materialized (
    select secondary.backend_id, secondary.tenant_ids, secondary.resource_types
    [registered]
), event as materialized (
    select nextval('{schema}.outbox_event_id_seq') as event_id,
           cast(hashtextextended(tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0) as key_hash,
           writer.transaction_id, writer.stamp, given.*,
           array(select secondary.backend_id from secondary where [wants]) as owed_to
    from writer cross join unnest(
        cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:resource_ids as text[]),
        cast(:operations as text[]), cast(:versions as text[]), cast(:fhir_versions as text[]),
        cast(:contents as text[]), cast(:bulk_ids as uuid[]), cast(:headers as text[])
    ) as given (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
), written as (
    insert into {schema}.outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version,
           cast(content as json), bulk_id, cast(headers as json), stamp
    from event
), owed as (
    insert into {schema}.outbox_delivery (backend_id, lane, event_id, key_hash)
    select owed.backend_id, event.lane, event.event_id, event.key_hash
    from event cross join unnest(event.owed_to) as owed (backend_id)
)""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "given.tenant_id")
    .replace("[resource_type]", "given.resource_type")
    .replace("[stamp]", STAMP)
    + _ANSWER
)

# Nearly every transaction records one event. The same without rows to join: the id comes first because a CASE asks for
# it, and what is written is given where it is written. A tenth less of the server's time than through a list of one.
RECORD_ONE = Statement(
    """
with event as materialized (
    select case when pg_current_xact_id() is not null then nextval('{schema}.outbox_event_id_seq') end as event_id,
           cast(hashtextextended([tenant_id], 0) & 63 as smallint) as lane,
           hashtextextended([tenant_id] || '/' || [resource_type] || '/' || cast(:resource_id as text), 0) as key_hash,
           pg_current_xact_id() as transaction_id, [stamp] as stamp,
           array(
    select secondary.backend_id
    [registered]
      and [wants]
           ) as owed_to
), written as (
    insert into {schema}.outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, [tenant_id], [resource_type], cast(:resource_id as text), cast(:operation as text),
           cast(:version as text), cast(:fhir_version as text), cast(cast(:content as text) as json),
           cast(:bulk_id as uuid), cast(cast(:headers as text) as json), stamp
    from event
), owed as (
    insert into {schema}.outbox_delivery (backend_id, lane, event_id, key_hash)
    select unnest(owed_to), lane, event_id, key_hash from event
)""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "cast(:tenant_id as text)")
    .replace("[resource_type]", "cast(:resource_type as text)")
    .replace("[stamp]", STAMP)
    + _ANSWER
)

_ROWS_PER_STATEMENT = 1_000


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


def _recording(events: Sequence[SyncEvent], backend_ids: Sequence[str] | None) -> tuple[Statement, dict[str, Any]]:
    """Return the statement that writes these events, and its parameters."""
    chosen = None if backend_ids is None else list(backend_ids)
    if len(events) == 1:
        event = events[0]
        return RECORD_ONE, {
            "tenant_id": event.tenant_id,
            "resource_type": event.resource_type,
            "resource_id": event.resource_id,
            "operation": str(event.operation),
            "version": event.version,
            "fhir_version": event.fhir_version,
            "content": event.content,
            "bulk_id": event.bulk_id and str(event.bulk_id),
            "headers": event.headers,
            "backend_ids": chosen,
        }
    return RECORD, {
        "tenant_ids": [event.tenant_id for event in events],
        "resource_types": [event.resource_type for event in events],
        "resource_ids": [event.resource_id for event in events],
        "operations": [str(event.operation) for event in events],
        "versions": [event.version for event in events],
        "fhir_versions": [event.fhir_version for event in events],
        "contents": [event.content for event in events],
        "bulk_ids": [event.bulk_id and str(event.bulk_id) for event in events],
        "headers": [event.headers for event in events],
        "backend_ids": chosen,
    }


def _chunks(events: list[SyncEvent]) -> Iterable[list[SyncEvent]]:
    for start in range(0, len(events), _ROWS_PER_STATEMENT):
        yield events[start : start + _ROWS_PER_STATEMENT]


def _token(rows: Sequence[Any]) -> SyncToken:
    if rows and not rows[0][4]:
        raise NoSecondary(
            "record: no secondary is registered, so nobody would ever get these events; "
            "start a relay, or call `await manager.register()`, before the first write"
        )
    transaction_id, stamp = (rows[0][2], rows[0][3]) if rows else (0, 0)
    return SyncToken.of(transaction_id, stamp, [(row[0], row[1]) for row in rows])


def _record_on_sqlalchemy(
    connection: Connection, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    refuse_autocommit(connection)
    rows: list[Any] = []
    for chunk in _chunks(events):
        statement, parameters = _recording(chunk, backend_ids)
        try:
            rows += connection.execute(_sqlalchemy_text(statement, schema), parameters)
        except DBAPIError as error:
            # Its text would quote the parameters, which are content.
            error.hide_parameters = True
            raise
    return _token(rows)


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
    for chunk in _chunks(events):
        statement, parameters = _recording(chunk, backend_ids)
        cursor = connection.execute(_psycopg_text(statement, schema), parameters)
        rows += cursor.fetchall()
    return _token(rows)


async def _record_on_asyncpg(
    connection: Any, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    if not connection.is_in_transaction():
        raise _no_transaction()
    rows: list[Any] = []
    for chunk in _chunks(events):
        statement, parameters = _recording(chunk, backend_ids)
        rows += await connection.fetch(*statement.arguments(schema, parameters))
    return _token(rows)


async def _record_on_async_psycopg(
    connection: Any, events: list[SyncEvent], schema: str, backend_ids: Sequence[str] | None
) -> SyncToken:
    _refuse_idle_autocommit(connection)
    rows: list[Any] = []
    for chunk in _chunks(events):
        statement, parameters = _recording(chunk, backend_ids)
        cursor = await connection.execute(_psycopg_text(statement, schema), parameters)
        rows += await cursor.fetchall()
    return _token(rows)


def _refuse_idle_autocommit(connection: Any) -> None:
    # In autocommit only an explicit transaction block carries the event; status 0 is "idle".
    if connection.autocommit and connection.info.transaction_status == 0:
        raise _no_transaction()


def _no_transaction() -> NotInTransaction:
    return NotInTransaction(
        "record: the connection has no transaction open, so the event could be stored without its change; "
        "begin a transaction, write the business rows, then record"
    )


@cache
def _sqlalchemy_text(statement: Statement, schema: str) -> TextClause:
    return text(statement.on(schema))


@cache
def _psycopg_text(statement: Statement, schema: str) -> str:
    return str(_sqlalchemy_text(statement, schema).compile(dialect=dialect_of("psycopg")))
