"""record(): events and what is owed of them on a raw connection, whatever its driver."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg
import psycopg
import pytest
from sqlalchemy import URL, create_engine, event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import (
    InvalidEvent,
    MemorySecondary,
    NoSecondary,
    NotInTransaction,
    SettingsError,
    StoredResource,
    SyncConfig,
    SyncEvent,
    SyncManager,
    record,
)
from outbox.migrate import migrate

Opener = Callable[[AsyncExitStack, URL, bool], Awaitable[Any]]


async def _sqlalchemy(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
    engine = create_engine(url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    if autocommit:
        return stack.enter_context(engine.execution_options(isolation_level="AUTOCOMMIT").connect())
    return stack.enter_context(engine.begin())


def _sqlalchemy_async(driver: str) -> Opener:
    async def opened(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
        engine = create_async_engine(url.set(drivername=f"postgresql+{driver}"), poolclass=NullPool)
        if not autocommit:
            return await stack.enter_async_context(engine.begin())
        connection = await stack.enter_async_context(engine.connect())
        return await connection.execution_options(isolation_level="AUTOCOMMIT")

    return opened


async def _asyncpg(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
    connection = await asyncpg.connect(plain(url))
    stack.push_async_callback(connection.close)
    if not autocommit:
        await stack.enter_async_context(connection.transaction())
    return connection


async def _psycopg(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
    return stack.enter_context(psycopg.connect(plain(url), autocommit=autocommit))


async def _psycopg_async(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
    connection = await psycopg.AsyncConnection.connect(plain(url), autocommit=autocommit)
    return await stack.enter_async_context(connection)


def _with_rows_as_dictionaries(opener: Opener) -> Opener:
    async def opened(stack: AsyncExitStack, url: URL, autocommit: bool) -> Any:
        connection = await opener(stack, url, autocommit)
        connection.row_factory = psycopg.rows.dict_row
        return connection

    return opened


OPENERS: dict[str, Opener] = {
    "sqlalchemy over psycopg": _sqlalchemy,
    "sqlalchemy over asyncpg": _sqlalchemy_async("asyncpg"),
    "sqlalchemy over psycopg, async": _sqlalchemy_async("psycopg"),
    "asyncpg": _asyncpg,
    "psycopg": _psycopg,
    "psycopg, async": _psycopg_async,
    "psycopg, rows as dictionaries": _with_rows_as_dictionaries(_psycopg),
    "psycopg, async, rows as dictionaries": _with_rows_as_dictionaries(_psycopg_async),
}
every_kind = pytest.mark.parametrize("kind", OPENERS)


def plain(url: URL) -> str:
    return url.set(drivername="postgresql").render_as_string(hide_password=False)


@asynccontextmanager
async def connected(kind: str, engine: AsyncEngine, *, autocommit: bool = False) -> AsyncIterator[Any]:
    """Yield a connection of one kind, in a transaction that commits at the end unless it is in autocommit."""
    async with AsyncExitStack() as stack:
        yield await OPENERS[kind](stack, engine.url, autocommit)


async def recorded(connection: Any, events: Any, **options: Any) -> list[int]:
    token = record(connection, events, **options)
    return (await token if inspect.isawaitable(token) else token).positions


async def rows(engine: AsyncEngine, query: str) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


def notes(count: int) -> list[SyncEvent]:
    return [SyncEvent.create("Note", f"{number}", {"n": number}) for number in range(count)]


@pytest.fixture
async def registered(primary: AsyncEngine) -> AsyncEngine:
    """The primary with two secondaries in its registry."""
    secondaries = [MemorySecondary("first"), MemorySecondary("second")]
    await SyncManager(primary, secondaries, config=SyncConfig(doorbell=False)).register()
    return primary


@every_kind
async def test_positions_come_back_in_the_order_given_with_one_delivery_per_secondary(
    registered: AsyncEngine, kind: str
) -> None:
    """Promise 1, on every kind of connection."""
    events = notes(1_100)
    async with connected(kind, registered) as connection:
        positions = await recorded(connection, events)
    assert positions == sorted(set(positions))
    stored = await rows(registered, "select event_id, resource_id, content::text from outbox order by event_id")
    assert stored == [(at, each.resource_id, each.content) for at, each in zip(positions, events, strict=True)]
    owed = await rows(registered, "select backend_id, event_id from outbox_delivery order by backend_id, event_id")
    assert owed == [(name, position) for name in ("first", "second") for position in positions]


@every_kind
async def test_a_rollback_takes_the_events_along(registered: AsyncEngine, kind: str) -> None:
    """Promise 1, A1."""
    with suppress(LookupError):
        async with connected(kind, registered) as connection:
            assert len(await recorded(connection, notes(3))) == 3
            raise LookupError
    assert await rows(registered, "select event_id from outbox") == []
    assert await rows(registered, "select event_id from outbox_delivery") == []


@every_kind
async def test_autocommit_is_refused_before_any_sql(registered: AsyncEngine, kind: str) -> None:
    """A5: an event that would commit by itself. That no position was drawn shows that nothing ran."""
    async with connected(kind, registered, autocommit=True) as connection:
        with pytest.raises(NotInTransaction, match="begin a transaction"):
            await recorded(connection, notes(1))
    assert await rows(registered, "select is_called from outbox_event_id_seq") == [(False,)]


@pytest.mark.parametrize("kind", ["psycopg", "psycopg, async"])
async def test_an_explicit_transaction_on_an_autocommit_connection_carries_events(
    registered: AsyncEngine, kind: str
) -> None:
    async with connected(kind, registered, autocommit=True) as connection, AsyncExitStack() as transaction:
        if kind == "psycopg":
            transaction.enter_context(connection.transaction())
        else:
            await transaction.enter_async_context(connection.transaction())
        assert len(await recorded(connection, notes(2))) == 2
    assert await rows(registered, "select count(*) from outbox") == [(2,)]


@every_kind
async def test_an_empty_registry_is_an_error(primary: AsyncEngine, kind: str) -> None:
    """Promise 2: an event nobody would ever get is not taken in silence."""
    with pytest.raises(NoSecondary, match="register"):
        async with connected(kind, primary) as connection:
            await recorded(connection, notes(1))
    assert await rows(primary, "select event_id from outbox") == []


@every_kind
async def test_backend_ids_limit_who_is_owed(registered: AsyncEngine, kind: str) -> None:
    async with connected(kind, registered) as connection:
        (both,) = await recorded(connection, notes(1))
        (one,) = await recorded(connection, notes(1), backend_ids=["second"])
    owed = await rows(registered, "select event_id, backend_id from outbox_delivery order by event_id, backend_id")
    assert owed == [(both, "first"), (both, "second"), (one, "second")]


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 1), (1_000, 1), (1_001, 2), (2_500, 3)])
async def test_one_statement_carries_a_thousand_events(registered: AsyncEngine, count: int, expected: int) -> None:
    statements: list[str] = []
    event.listen(registered.sync_engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    async with registered.begin() as connection:
        token = await record(connection, notes(count))
    assert len(token.positions) == count
    assert len(statements) == expected


async def test_one_event_and_any_iterable_are_taken(registered: AsyncEngine) -> None:
    async with registered.begin() as connection:
        assert len((await record(connection, SyncEvent.delete("Note", "1"))).positions) == 1
        assert len((await record(connection, (each for each in notes(3)))).positions) == 3


async def test_an_insert_only_role_can_record(registered: AsyncEngine) -> None:
    """INVARIANTS 5.2 row 4: the application reads the registry, and neither events nor deliveries."""
    async with registered.begin() as connection:
        for statement in (
            "create role outbox_writer_of_a_test",
            "grant insert on outbox, outbox_delivery to outbox_writer_of_a_test",
            "grant select on outbox_secondary to outbox_writer_of_a_test",
            "grant usage on sequence outbox_event_id_seq to outbox_writer_of_a_test",
        ):
            await connection.execute(text(statement))
        await connection.execute(text("set local role outbox_writer_of_a_test"))
        token = await record(connection, notes(3))
        for forbidden in ("select 1 from outbox", "delete from outbox", "update outbox_delivery set lane = 1"):
            savepoint = await connection.begin_nested()
            with pytest.raises(DBAPIError) as refusal:
                await connection.execute(text(forbidden))
            assert getattr(refusal.value.orig, "sqlstate", None) == "42501"
            await savepoint.rollback()
        await connection.execute(text("reset role"))
        assert (await connection.execute(text("select count(*) from outbox"))).scalar_one() == len(token.positions)
        assert (await connection.execute(text("select count(*) from outbox_delivery"))).scalar_one() == 6
        # A role belongs to the whole server; nothing of this must outlive the test.
        await connection.rollback()


async def test_a_bulk_is_one_event_per_resource_with_tombstones_as_deletes(registered: AsyncEngine) -> None:
    """O6: nothing is left to expand later; order against single events is that of positions."""
    gone = datetime(2024, 2, 29, tzinfo=UTC)
    resources = [
        StoredResource(resource_type="Note", resource_id="1", content='{"decimal": 1.50}', version=7),
        StoredResource(resource_type="Note", resource_id="2", content={"ignored": True}, deleted_at=gone),
        StoredResource(resource_type="Memo", resource_id="1", content=b'{"b": null}', fhir_version="4.0"),
    ]
    events = SyncEvent.bulk(iter(resources), headers={"actor": "import"})
    async with registered.begin() as connection:
        token = await record(connection, events)
    columns = "resource_type, resource_id, operation, content::text, version, fhir_version"
    assert await rows(registered, f"select {columns} from outbox order by event_id") == [
        ("Note", "1", "update", '{"decimal": 1.50}', "7", None),
        ("Note", "2", "delete", None, None, None),
        ("Memo", "1", "update", '{"b": null}', None, "4.0"),
    ]
    assert await rows(registered, "select distinct bulk_id, headers::text from outbox") == [
        (events[0].bulk_id, '{"actor":"import"}')
    ]
    assert len(token.positions) == 3


async def test_a_bulk_of_ten_thousand_resources_is_recorded_whole(registered: AsyncEngine) -> None:
    bulk = [StoredResource(resource_type="Note", resource_id=f"{n}", content={"n": n}) for n in range(10_000)]
    async with registered.begin() as connection:
        token = await record(connection, SyncEvent.bulk(bulk))
    assert len(token.positions) == 10_000
    assert await rows(registered, "select count(*), count(distinct bulk_id) from outbox") == [(10_000, 1)]


@pytest.mark.parametrize(
    ("changed", "path"),
    [
        ({"tenant_id": "globex"}, "resources[1].tenant_id"),
        ({"content": {"a": [1, float("nan")]}}, "resources[1].content.a[1]"),
        ({"content": None}, "resources[1].content"),
        ({"resource_id": ""}, "resources[1].resource_id"),
    ],
)
def test_a_bulk_with_one_bad_resource_is_refused_whole_with_its_place(changed: dict[str, Any], path: str) -> None:
    """Promise 13: a foreign tenant above all."""
    good = {"resource_type": "Note", "resource_id": "1", "content": {}, "tenant_id": "acme"}
    with pytest.raises(InvalidEvent) as refusal:
        SyncEvent.bulk([StoredResource(**good), StoredResource(**good | changed)], tenant_id="acme")
    assert refusal.value.path == path


@every_kind
async def test_headers_arrive_to_the_letter(registered: AsyncEngine, kind: str) -> None:
    headers = {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "actor": 'Zoë "Z" \\ Å'}
    async with connected(kind, registered) as connection:
        await recorded(connection, SyncEvent.create("Note", "1", {}, headers=headers))
        await recorded(connection, SyncEvent.create("Note", "2", {}, headers={}))
    ((first,), (second,)) = await rows(registered, "select headers::text from outbox order by event_id")
    assert (first, second) == (SyncEvent.create("Note", "1", {}, headers=headers).headers, None)


async def test_another_schema_is_written_to_and_its_name_is_no_way_into_sql(database: str) -> None:
    """INVARIANTS 5.2 row 1."""
    engine = create_async_engine(database, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.execute(text("create schema sync"))
    await migrate(engine, "sync")
    config = SyncConfig(doorbell=False, database_schema="sync")
    await SyncManager(engine, [MemorySecondary()], config=config).register()
    async with engine.begin() as connection:
        assert len((await record(connection, notes(1), schema="sync")).positions) == 1
        for hostile in ('public"; drop table sync.outbox; --', "Sync", "", "sync.outbox", "s\N{KELVIN SIGN}"):
            with pytest.raises(SettingsError):
                await record(connection, notes(1), schema=hostile)
    assert await rows(engine, "select count(*) from sync.outbox") == [(1,)]


def test_what_is_no_connection_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="SQLAlchemy, asyncpg or psycopg connection, not <class 'object'>"):
        record(object(), notes(1))  # type: ignore[call-overload]
