"""PostgreSQL as a secondary keeps the contract, and survives what databases do to their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.event import listen
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox.content import fingerprint
from outbox.errors import SettingsError, Unavailable
from outbox.secondaries.base import Applied, Rejected, ResourceDigest, Retry, Stale, Summary
from outbox.secondaries.sql import SqlSecondary
from outbox.testing.contract import SecondaryContract
from outbox.testing.postgres import EmbeddedPostgres, PostgresServer
from outbox.testing.states import CONTENTS, held, remove, seen, write

TABLE = "outbox_resources"


class TestPostgres(SecondaryContract):
    @pytest.fixture
    async def secondary(self, database: str) -> AsyncIterator[SqlSecondary]:
        secondary = SqlSecondary("copy", database)
        yield secondary
        await secondary.aclose()


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database)
    yield engine
    await engine.dispose()


@pytest.fixture
async def copy(engine: AsyncEngine) -> SqlSecondary:
    return SqlSecondary("copy", engine)


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(settings={"fsync": "off"}) as server:
        yield server


async def _run(engine: AsyncEngine, statement: str, **values: Any) -> Any:
    async with engine.begin() as connection:
        result = await connection.execute(text(statement), values)
        return result.scalar() if result.returns_rows else None


async def _code(secondary: SqlSecondary) -> str:
    with pytest.raises(Unavailable) as caught:
        await secondary.apply([write("secret", 99)])
    assert "secret" not in str(caught.value)
    return caught.value.code


async def _until_blocked(engine: AsyncEngine) -> None:
    """Return once some session waits for a lock."""
    async with asyncio.timeout(10):
        while not await _run(engine, "select count(*) from pg_locks where not granted"):  # noqa: ASYNC110 - nothing tells us
            await asyncio.sleep(0.01)


async def _lock(connection: AsyncConnection, resource_id: str) -> None:
    lock = text(f"select 1 from {TABLE} where resource_id = :id for update")
    await connection.execute(lock, {"id": resource_id})


@pytest.mark.parametrize("name", CONTENTS)
async def test_content_of_gives_back_every_letter(copy: SqlSecondary, name: str):
    await copy.apply([write("p", 1, CONTENTS[name])])
    assert await copy.content_of("Patient", "p", tenant_id="acme") == CONTENTS[name]
    assert await copy.content_of("Patient", "p") is None
    await copy.apply([remove("p", 2)])
    assert await copy.content_of("Patient", "p", tenant_id="acme") is None


async def test_other_drivers_serve_as_well(database: str):
    copy = SqlSecondary("copy", database.replace("+asyncpg", "+psycopg"))
    batch = [write(f"p{number}", 2**62 + number) for number in range(600)]
    assert list(await copy.apply(batch)) == [Applied()] * 600
    assert list(await copy.apply([write("p1", 1), remove("p2", 2**63 - 1)])) == [Stale(), Applied()]
    assert await seen(copy) == held(batch[:2] + batch[3:])
    await copy.aclose()


async def test_only_a_write_moves_the_time_it_was_written(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 2)])
    await _run(engine, f"update {TABLE} set written_at = now() - interval '1 day'")
    aged = f"select now() - written_at > interval '23 hours' from {TABLE}"
    await copy.apply([write("p", 1)])
    assert await _run(engine, aged)
    await copy.apply([write("p", 3)])
    assert not await _run(engine, aged)


async def test_a_schema_can_be_named(engine: AsyncEngine):
    copy = SqlSecondary("copy", engine, "resources", "copies")
    assert await _code(copy) == "3F000"
    await _run(engine, "create schema copies")
    assert list(await copy.apply([write("p", 1)])) == [Applied()]
    assert await _run(engine, "select count(*) from copies.resources") == 1


async def test_keys_are_compared_by_bytes_whatever_the_database_does(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    collations = "select string_agg(collation_name, ' ') from information_schema.columns where table_name = :table"
    assert await _run(engine, collations, table=TABLE) == "C C C C C"


@pytest.mark.parametrize("name", ["", "a b", 'a"b', "a;b", "1a", "a.b", "é", "a-b", "a" * 64, "a\n"])
def test_names_that_need_quoting_are_refused(name: str):
    with pytest.raises(SettingsError, match="table"):
        SqlSecondary("copy", "postgresql+asyncpg://127.0.0.1/x", name)
    with pytest.raises(SettingsError, match="schema"):
        SqlSecondary("copy", "postgresql+asyncpg://127.0.0.1/x", schema=name or " ")


async def test_many_first_users_create_one_table(database: str):
    async with AsyncExitStack() as stack:
        copies = [SqlSecondary("copy", database) for _ in range(8)]
        for copy in copies:
            stack.push_async_callback(copy.aclose)
        batches = [[write(f"p{number}", 1)] for number in range(8)]
        answers = await asyncio.gather(*(copy.apply(batch) for copy, batch in zip(copies, batches, strict=True)))
        assert [list(answer) for answer in answers] == [[Applied()]] * 8
        assert await seen(copies[0]) == held(event for batch in batches for event in batch)


async def test_a_table_that_was_dropped_is_unavailable_once(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    await _run(engine, f"drop table {TABLE}")
    assert await _code(copy) == "42P01"
    assert list(await copy.apply([write("p", 1)])) == [Applied()]


async def test_rows_that_the_database_refuses_are_rejected_alone(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    await _run(engine, f"alter table {TABLE} add constraint no_secrets check (resource_id not like 'secret%')")
    names = ["secret1" if n == 7 else "secret2" if n == 93 else f"p{n:03d}" for n in range(100)]
    outcomes = await copy.apply([write(name, 2) for name in names])
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome == (Rejected("23514", "the database refuses this row") if "secret" in name else Applied())


async def test_relays_that_meet_on_the_same_keys_never_deadlock(database: str, engine: AsyncEngine):
    copies = [SqlSecondary("copy", database) for _ in range(2)]
    names = [f"p{number:03d}" for number in range(400)]
    for step in range(1, 11, 2):
        up, down = [write(name, step) for name in names], [write(name, step + 1) for name in reversed(names)]
        first, second = await asyncio.gather(copies[0].apply(up), copies[1].apply(down))
        assert list(second) == [Applied()] * 400
        assert set(first) <= {Applied(), Stale()}
        assert await seen(copies[0]) == held(down)
    for copy in copies:
        await copy.aclose()
    assert await _run(engine, "select deadlocks from pg_stat_database where datname = current_database()") == 0


async def test_the_loser_of_a_deadlock_tries_again(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("a", 1), write("z", 1)])
    async with engine.connect() as other:
        # The one that looks for the deadlock is the one that is made to lose it.
        await other.execute(text("set local deadlock_timeout = '1min'"))
        await _lock(other, "z")
        applying = asyncio.ensure_future(copy.apply([write("a", 2), write("z", 2)]))
        await _until_blocked(engine)
        await _lock(other, "a")
        await other.commit()
    assert list(await applying) == [Applied(), Applied()]


async def test_rows_that_others_hold_are_tried_again_later(database: str, engine: AsyncEngine):
    settings = {"server_settings": {"lock_timeout": "20ms"}}
    impatient = create_async_engine(database, connect_args=settings)
    copy = SqlSecondary("copy", impatient)
    await copy.apply([write("p", 1), write("q", 1)])
    async with engine.begin() as other:
        await _lock(other, "q")
        assert [type(outcome) for outcome in await copy.apply([write("p", 2), write("q", 2)])] == [Applied, Retry]
    assert list(await copy.apply([write("p", 2), write("q", 2)])) == [Stale(), Applied()]
    await copy.aclose()
    assert await _run(impatient, "select 1") == 1
    await impatient.dispose()


async def test_a_row_that_is_held_too_long_is_blamed_as_the_database_answers(database: str, engine: AsyncEngine):
    """F1: the whole is not away for one row that somebody never lets go."""
    copy, patient = SqlSecondary("copy", database, timeout=timedelta(seconds=1)), SqlSecondary("copy", database)
    assert list(await patient.apply([write("secret", 1)])) == [Applied()]
    async with engine.begin() as other:
        await _lock(other, "secret")
        [outcome] = await copy.apply([write("secret", 99)])
    assert isinstance(outcome, Retry)
    assert outcome.code == "timeout"
    assert list(await patient.apply([write("secret", 2)])) == [Applied()]
    await copy.aclose()
    await patient.aclose()


@pytest.mark.parametrize("settings", [{}, {"lock_timeout": "20ms"}], ids=["we give up", "it gives up"])
async def test_a_table_that_takes_no_writes_is_no_fault_of_its_rows(
    database: str, engine: AsyncEngine, settings: dict[str, str]
):
    """An index that is built, a long change of the table: nothing is wrong with what is to be written."""
    own = create_async_engine(database, connect_args={"server_settings": settings})
    copy = SqlSecondary("copy", own, timeout=timedelta(seconds=1) if not settings else timedelta(seconds=30))
    assert list(await copy.apply([write("secret", 1)])) == [Applied()]
    async with engine.begin() as other:
        await other.execute(text(f"lock table {TABLE} in share mode"))
        assert await seen(copy) == held([write("secret", 1)])
        assert await _code(copy) == ("55P03" if settings else "timeout")
        with pytest.raises(Unavailable):
            await copy.check()
    await copy.check()
    assert list(await copy.apply([write("secret", 2)])) == [Applied()]
    await own.dispose()


async def test_a_server_whose_standby_is_gone_is_away_though_it_answers(server: EmbeddedPostgres):
    """It has the rows and cannot say so: every commit waits for the standby."""
    copy = SqlSecondary("copy", server.dsn(), "copy_alone", timeout=timedelta(seconds=1))
    administrator = create_async_engine(server.dsn(), isolation_level="AUTOCOMMIT")
    await copy.apply([write("secret", 1)])
    async with administrator.connect() as connection:
        await connection.execute(text("alter system set synchronous_standby_names = 'gone'"))
        await connection.execute(text("select pg_reload_conf()"))
        try:
            assert await _told(copy) == "timeout"
            with pytest.raises(Unavailable):
                await copy.check()
        finally:
            await connection.execute(text("alter system reset synchronous_standby_names"))
            await connection.execute(text("select pg_reload_conf()"))
    await copy.check()
    assert list(await copy.apply([write("secret", 100)])) == [Applied()]
    await copy.aclose()
    await administrator.dispose()


async def _told(copy: SqlSecondary) -> str:
    """Return the code of the first batch that is refused; sessions read a new setting some moment later."""
    async with asyncio.timeout(20):
        while True:
            try:
                await copy.apply([write("secret", 99)])
            except Unavailable as error:
                return error.code


async def test_a_check_leaves_nothing_and_a_rule_of_the_table_is_no_failure(copy: SqlSecondary, engine: AsyncEngine):
    await copy.check()
    await _run(engine, f"alter table {TABLE} add constraint named check (resource_id like 'p%')")
    await copy.check()
    assert await _run(engine, f"select count(*) from {TABLE}") == 0
    assert list(await copy.apply([write("p", 1)])) == [Applied()]


async def test_a_missing_database_is_told_by_its_code(database: str):
    copy = SqlSecondary("copy", f"{database}_missing")
    assert await _code(copy) == "3D000"
    await copy.aclose()


@pytest.mark.parametrize("given", [False, True], ids=["own engine", "given engine"])
async def test_a_server_that_was_down_is_used_again(server: EmbeddedPostgres, given: bool):
    engine = create_async_engine(server.dsn())
    copy = SqlSecondary("copy", engine if given else server.dsn(), f"copy_{given}")
    await copy.apply([write("p", 2)])
    await asyncio.to_thread(server.crash)
    try:
        async with asyncio.timeout(5):
            await _code(copy)
            assert await _code(copy) == "refused"
            for attempt in (copy.check(), seen(copy)):
                with pytest.raises(Unavailable):
                    await attempt
    finally:
        await asyncio.to_thread(server.start)
    await copy.check()
    assert list(await copy.apply([write("p", 1)])) == [Stale()]
    assert await seen(copy) == held([write("p", 2)])
    await copy.aclose()
    await engine.dispose()


async def test_content_that_is_no_json_equals_nothing_and_spoils_no_listing(copy: SqlSecondary, engine: AsyncEngine):
    """R5: another hand's damage shows where it is, by scan and by find."""
    await copy.apply(batch := [write("a", 1), write("b", 2), write("c", 3)])
    await _run(engine, f"update {TABLE} set content = content || 'x' where resource_id = 'b'")
    damaged = ResourceDigest("b", 2, "")
    assert await seen(copy) == [held(batch)[0], damaged, held(batch)[2]]
    assert await copy.find("acme", "Patient", ["b"]) == [damaged]


async def test_a_summary_is_made_of_what_is_there_now(copy: SqlSecondary, engine: AsyncEngine):
    """R5: an altered content of an unaltered position changes the sum, back again it does not."""
    await copy.apply([write(f"p{number}", number) for number in range(1, 10)])
    before = await copy.summarise("acme", "Patient", None, None)
    await _run(engine, f"update {TABLE} set content = content || ' ' where resource_id = 'p7'")
    altered = await copy.summarise("acme", "Patient", None, None)
    assert (altered.count, altered.total != before.total) == (9, True)
    assert await copy.summarise("acme", "Patient", "p7", None) == await copy.summarise("acme", "Patient", "p70", None)
    await _run(engine, f"update {TABLE} set content = rtrim(content)")
    assert await copy.summarise("acme", "Patient", None, None) == before


async def test_a_summary_is_one_statement_that_answers_two_numbers(copy: SqlSecondary, engine: AsyncEngine):
    """No content leaves the database."""
    await copy.apply([write(f"p{number:04d}", number) for number in range(1, 1_001)])
    asked: list[str] = []
    listen(engine.sync_engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert (await copy.summarise("acme", "Patient", "p0100", "p0900")).count == 800
    [statement] = asked
    assert statement.startswith("SELECT count(*)")


async def test_the_highest_position_is_one_look_at_an_index(copy: SqlSecondary, engine: AsyncEngine):
    """C4: a relay asks for it before it begins; however long the table, it can wait for that."""
    await copy.apply([write(f"p{number:04d}", number) for number in range(1, 1_001)])
    await _run(engine, f"analyze {TABLE}")
    asked: list[str] = []
    listen(engine.sync_engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
    assert await copy.highest_position() == 1_000
    plan = str(await _run(engine, f"explain (format json) {asked[0]}"))
    assert "Index Only Scan" in plan
    assert "Seq Scan" not in plan


@pytest.mark.parametrize("name", ["a" * 63, "a" * 62 + "b"])
async def test_a_name_of_full_length_leaves_room_for_its_index(engine: AsyncEngine, name: str):
    copies = [SqlSecondary("copy", engine, each) for each in (name, "a" * 62)]
    for copy in copies:
        assert list(await copy.apply([write("p", 1)])) == [Applied()]
        assert await copy.highest_position() == 1


async def test_a_summary_does_not_depend_on_how_the_database_encodes_text(postgres: PostgresServer):
    """The sum is of UTF-8 bytes also where the database keeps others."""
    name = f"narrow_{uuid4().hex[:16]}"
    with psycopg.connect(postgres.dsn(driver="postgresql"), autocommit=True) as connection:
        connection.execute(f"create database {name} template template0 encoding 'LATIN1' locale 'C'")
        copy = SqlSecondary("copy", postgres.dsn(name))
        await copy.apply([write("é", 1, '{"ä":"ÿ"}')])
        assert await copy.summarise("acme", "Patient", None, None) == Summary(1, fingerprint("é", '{"ä":"ÿ"}'))
        await copy.aclose()
        connection.execute(f"drop database {name} with (force)")


async def test_a_question_to_a_database_that_is_gone_is_unavailable(server: EmbeddedPostgres):
    copy = SqlSecondary("copy", server.dsn(), "asked")
    await copy.apply([write("secret", 1)])
    server.kill()
    try:
        for ask in (
            lambda: copy.find("acme", "Patient", ["secret"]),
            copy.scopes,
            lambda: copy.summarise("acme", "Patient", None, None),
            copy.highest_position,
        ):
            with pytest.raises(Unavailable) as caught:
                await ask()
            assert "secret" not in str(caught.value)
    finally:
        server.start()
    assert await copy.scopes() == [("acme", "Patient")]
    await copy.aclose()
