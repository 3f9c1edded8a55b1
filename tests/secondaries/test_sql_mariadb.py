"""MariaDB as a secondary keeps the contract, and survives what databases do to their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.content import fingerprint
from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Rejected, ResourceDigest, Retry, Stale, Summary
from outbox.secondaries.sql import SqlSecondary
from outbox.testing.child import ServerMissing
from outbox.testing.contract import SecondaryContract
from outbox.testing.servers import MariaDBServer
from outbox.testing.states import CONTENTS, IDS, held, seen, write


class TestMariaDB(SecondaryContract):
    @pytest.fixture
    async def secondary(self, mariadb_url: str) -> AsyncIterator[SqlSecondary]:
        async for secondary in _own_table(mariadb_url):
            yield secondary


async def _own_table(url: str, **settings: Any) -> AsyncIterator[SqlSecondary]:
    table = f"copy_{uuid4().hex}"
    secondary = SqlSecondary("copy", url, table, **settings)
    yield secondary
    await secondary.aclose()
    engine = create_async_engine(url)
    await _run(engine, f"drop table if exists {table}")
    await engine.dispose()


@pytest.fixture
async def copy(mariadb_url: str) -> AsyncIterator[SqlSecondary]:
    async for secondary in _own_table(mariadb_url):
        yield secondary


@pytest.fixture
async def engine(mariadb_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(mariadb_url)
    yield engine
    await engine.dispose()


async def _run(engine: AsyncEngine, statement: str) -> Any:
    async with engine.begin() as connection:
        result = await connection.execute(text(statement))
        return result.scalar() if result.returns_rows else None


async def _code(secondary: SqlSecondary) -> str:
    with pytest.raises(Unavailable) as caught:
        await secondary.apply([write("secret", 99)])
    assert "secret" not in str(caught.value)
    return caught.value.code


@pytest.mark.parametrize("name", CONTENTS)
async def test_content_of_gives_back_every_letter(copy: SqlSecondary, name: str):
    await copy.apply([write("p", 1, CONTENTS[name])])
    assert await copy.content_of("Patient", "p", tenant_id="acme") == CONTENTS[name]


async def test_the_character_set_of_the_database_does_not_matter(engine: AsyncEngine, mariadb_url: str):
    await _run(engine, "create or replace database narrow character set latin1")
    copy = SqlSecondary("copy", mariadb_url.replace("/outbox", "/narrow"))
    batch = [write(name, position, CONTENTS["unicode"]) for position, name in enumerate(IDS, 1)]
    assert list(await copy.apply(batch)) == [Applied()] * len(IDS)
    assert await seen(copy) == held(batch)
    total = sum(fingerprint(name, CONTENTS["unicode"]) for name in IDS)
    assert await copy.summarise("acme", "Patient", None, None) == Summary(len(IDS), total)
    await copy.aclose()
    await _run(engine, "drop database narrow")


async def test_a_batch_is_a_few_statements(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    counted = "select variable_value from information_schema.global_status where variable_name = 'com_insert'"
    before = int(await _run(engine, counted))
    assert list(await copy.apply([write(f"p{number}", 2) for number in range(500)])) == [Applied()] * 500
    assert int(await _run(engine, counted)) - before == 1


async def test_only_a_write_moves_the_time_it_was_written(copy: SqlSecondary, engine: AsyncEngine):
    table = copy._table.name
    await copy.apply([write("p", 2)])
    await _run(engine, f"update {table} set written_at = now() - interval 1 day")
    aged = f"select now() - interval 23 hour > written_at from {table}"
    await copy.apply([write("p", 1)])
    assert await _run(engine, aged)
    await copy.apply([write("p", 3)])
    assert not await _run(engine, aged)


async def test_rows_that_the_database_refuses_are_rejected_alone(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    await _run(engine, f"alter table {copy._table.name} add check (resource_id not like 'secret%')")
    names = ["secret1" if n == 7 else "secret2" if n == 93 else f"p{n:03d}" for n in range(100)]
    outcomes = await copy.apply([write(name, 2) for name in names])
    for name, outcome in zip(names, outcomes, strict=True):
        assert outcome == (Rejected("23000", "the database refuses this row") if "secret" in name else Applied())


async def test_relays_that_meet_on_the_same_keys_never_deadlock(copy: SqlSecondary, mariadb_url: str):
    other = SqlSecondary("copy", mariadb_url, copy._table.name)
    names = [f"p{number:02d}" for number in range(60)]
    for step in range(1, 21, 2):
        up, down = [write(name, step) for name in names], [write(name, step + 1) for name in reversed(names)]
        first, second = await asyncio.gather(copy.apply(up), other.apply(down))
        assert list(second) == [Applied()] * 60
        assert set(first) <= {Applied(), Stale()}
        assert await seen(copy) == held(down)
    await other.aclose()


async def test_rows_that_others_hold_are_tried_again_later(copy: SqlSecondary, engine: AsyncEngine, mariadb_url: str):
    await copy.apply([write("p", 1), write("q", 1)])
    settings = {"init_command": "set session innodb_lock_wait_timeout = 0"}
    impatient = create_async_engine(mariadb_url, connect_args=settings)
    hurried = SqlSecondary("copy", impatient, copy._table.name)
    async with engine.begin() as other:
        whole_key = "tenant_id = 'acme' and resource_type = 'Patient' and resource_id = 'q'"
        await other.execute(text(f"select 1 from {copy._table.name} where {whole_key} for update"))
        assert [type(outcome) for outcome in await hurried.apply([write("p", 2), write("q", 2)])] == [Applied, Retry]
    assert list(await hurried.apply([write("p", 2), write("q", 2)])) == [Applied(), Applied()]
    await impatient.dispose()


async def test_a_row_that_is_held_too_long_is_blamed_as_the_database_answers(engine: AsyncEngine, mariadb_url: str):
    """F1: the whole is not away for one row that somebody never lets go."""
    async for copy in _own_table(mariadb_url, timeout=timedelta(seconds=0.3)):
        await copy.apply([write("secret", 1)])
        async with engine.begin() as other:
            whole_key = "tenant_id = 'acme' and resource_type = 'Patient' and resource_id = 'secret'"
            await other.execute(text(f"select 1 from {copy._table.name} where {whole_key} for update"))
            async with asyncio.timeout(5):
                [outcome] = await copy.apply([write("secret", 99)])
        assert isinstance(outcome, Retry)
        assert outcome.code == "timeout"
        assert list(await copy.apply([write("secret", 2)])) == [Applied()]


async def test_a_table_that_takes_no_writes_is_no_fault_of_its_rows(engine: AsyncEngine, mariadb_url: str):
    async for copy in _own_table(mariadb_url, timeout=timedelta(seconds=0.5)):
        await copy.apply([write("secret", 1)])
        async with engine.connect() as other:
            await other.execute(text(f"lock tables {copy._table.name} read"))
            assert await seen(copy) == held([write("secret", 1)])
            with pytest.raises(Unavailable) as caught:
                await copy.apply([write("secret", 99)])
            assert caught.value.code == "timeout"
            await other.execute(text("unlock tables"))
        await copy.check()
        assert list(await copy.apply([write("secret", 100)])) == [Applied()]


async def test_a_table_that_was_dropped_is_unavailable_once(copy: SqlSecondary, engine: AsyncEngine):
    await copy.apply([write("p", 1)])
    await _run(engine, f"drop table {copy._table.name}")
    assert await _code(copy) == "42S02"
    assert list(await copy.apply([write("p", 1)])) == [Applied()]


async def test_a_missing_database_is_told_by_its_code(mariadb_url: str):
    copy = SqlSecondary("copy", mariadb_url.replace("/outbox", "/missing"))
    assert await _code(copy) == "42000"
    await copy.aclose()


async def test_a_summary_is_of_utf8_bytes_however_the_content_is_kept(copy: SqlSecondary, engine: AsyncEngine):
    """R6: another hand may convert the column; the sum stays what it was."""
    await copy.apply([write("é", 1, CONTENTS["unicode"])])
    before = await copy.summarise("acme", "Patient", None, None)
    await _run(engine, f"alter table {copy._table.name} modify content longtext character set utf16")
    assert await copy.summarise("acme", "Patient", None, None) == before
    assert before == Summary(1, fingerprint("é", CONTENTS["unicode"]))


async def test_content_that_is_no_json_equals_nothing_and_spoils_no_listing(copy: SqlSecondary, engine: AsyncEngine):
    """R5: another hand's damage shows where it is, by scan and by find."""
    await copy.apply(batch := [write("a", 1), write("b", 2), write("c", 3)])
    await _run(engine, f"update {copy._table.name} set content = concat(content, 'x') where resource_id = 'b'")
    damaged = ResourceDigest("b", 2, "")
    assert await seen(copy) == [held(batch)[0], damaged, held(batch)[2]]
    assert await copy.find("acme", "Patient", ["b"]) == [damaged]


@pytest.fixture(scope="module")
def server() -> Iterator[MariaDBServer]:
    server = MariaDBServer()
    try:
        server.start()
        yield server
    except ServerMissing as missing:
        pytest.skip(str(missing))
    finally:
        server.close()


@pytest.mark.parametrize("given", [False, True], ids=["own engine", "given engine"])
async def test_a_server_that_was_down_is_used_again(server: MariaDBServer, given: bool):
    engine = create_async_engine(server.url)
    copy = SqlSecondary("copy", engine if given else server.url, f"copy_{given}")
    await copy.apply([write("p", 2)])
    await asyncio.to_thread(server.kill)
    try:
        async with asyncio.timeout(5):
            await _code(copy)
            assert await _code(copy) == "2003"
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


async def test_a_content_that_cannot_be_hashed_is_never_left_out_of_a_sum(server: MariaDBServer):
    """A text above `max_allowed_packet` has no hash, only a warning."""
    engine = create_async_engine(server.url)
    copy = SqlSecondary("copy", server.url, "packets")
    await copy.apply([write("p", 1, '{"text":"' + "x" * 500_000 + '"}'), write("q", 2)])
    await copy.aclose()
    before = await _run(engine, "select @@global.max_allowed_packet")
    await _run(engine, "set global max_allowed_packet = 65536")
    try:
        with pytest.raises(Unavailable, match="unreadable_content"):
            await copy.summarise("acme", "Patient", None, None)
        assert (await copy.summarise("acme", "Patient", "p", None)).count == 1
    finally:
        await _run(engine, f"set global max_allowed_packet = {before}")
        await copy.aclose()
        await engine.dispose()
