"""The proxy: what a client is told, and what the server did, when a connection fails at a known point."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.testing.proxy import Link, Proxy
from tests.relaying import execute, value
from tests.waiting import eventually

INSERT = "insert into written (number) values ($1)"
CUT_OFF = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, ConnectionError)


@pytest.fixture
async def proxy(primary: AsyncEngine) -> AsyncIterator[Proxy]:
    await execute(primary, "create table written (number integer primary key)")
    assert primary.url.port is not None
    async with Proxy(primary.url.port, {INSERT: "insert"}) as proxy:
        yield proxy


@asynccontextmanager
async def client(primary: AsyncEngine, proxy: Proxy, name: str = "somebody") -> AsyncIterator[asyncpg.Connection[Any]]:
    """A driver connection through the proxy."""
    url = primary.url.set(drivername="postgresql", port=proxy.port)
    dsn = url.render_as_string(hide_password=False)
    connection = await asyncpg.connect(dsn, server_settings={"application_name": name})
    try:
        yield connection
    finally:
        connection.terminate()


async def written(primary: AsyncEngine) -> list[int]:
    return list(await value(primary, "select coalesce(array_agg(number order by number), '{}') from written"))


async def caught(proxy: Proxy, stage: str, when: Literal["before", "after"]) -> Link:
    link = await proxy.catch(stage, when, 20)
    assert link is not None
    return link


@pytest.mark.parametrize(("when", "there"), [("before", []), ("after", [7])])
async def test_a_commit_is_cut_before_the_server_has_it_or_after(
    primary: AsyncEngine, proxy: Proxy, when: Literal["before", "after"], there: list[int]
) -> None:
    """A7: the client cannot tell one from the other."""

    async def write() -> None:
        async with client(primary, proxy) as connection, connection.transaction():
            await connection.execute(INSERT, 7)

    writing = asyncio.create_task(write())
    link = await caught(proxy, "commit", when)
    assert not writing.done()
    link.cut()
    with pytest.raises(CUT_OFF):
        await writing
    await eventually(lambda: not proxy.links)
    assert await written(primary) == there


async def test_a_prepared_statement_is_known_each_time_it_runs(primary: AsyncEngine, proxy: Proxy) -> None:
    """D1: the driver sends its text once, and only its name from then on."""
    async with client(primary, proxy, "relay-7") as connection:
        await connection.execute(INSERT, 1)
        again = asyncio.create_task(connection.execute(INSERT, 2))
        link = await caught(proxy, "insert", "before")
        assert link.name == "relay-7"
        link.cut()
        with pytest.raises(CUT_OFF):
            await again
    assert await written(primary) == [1]


async def test_a_statement_that_is_held_after_it_ran_has_run(primary: AsyncEngine, proxy: Proxy) -> None:
    """D1: its answer is on the way, and nobody is told."""
    async with client(primary, proxy) as connection:
        running = asyncio.create_task(connection.execute(INSERT, 3))
        link = await caught(proxy, "insert", "after")
        assert await written(primary) == [3]
        assert not running.done()
        link.cut()
        with pytest.raises(CUT_OFF):
            await running


async def test_nobody_is_caught_at_a_stage_that_nobody_reaches(primary: AsyncEngine, proxy: Proxy) -> None:
    assert await proxy.catch("commit", "after", 0.01) is None
    async with client(primary, proxy) as connection, connection.transaction():
        await connection.execute(INSERT, 4)
    assert await written(primary) == [4]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_who_comes_when_nobody_waits_any_more_is_cut_and_not_held_for_ever(
    primary: AsyncEngine, proxy: Proxy, when: Literal["before", "after"]
) -> None:
    """It had stepped in, and had not got as far as being held."""
    async with client(primary, proxy) as connection:
        [link] = proxy.links
        catching = asyncio.create_task(proxy.catch("insert", when, 0.01))
        await asyncio.sleep(0)
        trap = proxy.spring("insert", link.name)
        assert trap is not None
        assert await catching is None
        asking = asyncio.create_task(connection.execute("select pg_sleep(20)"))
        trap.hold(link)
        with pytest.raises(CUT_OFF):
            await asking


async def test_who_is_spared_is_let_pass(primary: AsyncEngine, proxy: Proxy) -> None:
    catching = asyncio.create_task(proxy.catch("insert", "before", 20, spared="survivor"))
    async with client(primary, proxy, "survivor-1") as connection:
        await connection.execute(INSERT, 6)
    async with client(primary, proxy, "relay-2") as connection:
        running = asyncio.create_task(connection.execute(INSERT, 8))
        link = await catching
        assert link is not None
        assert link.name == "relay-2"
        link.cut()
        with pytest.raises(CUT_OFF):
            await running
    assert await written(primary) == [6]


async def test_a_hole_swallows_what_is_said_and_what_is_answered(primary: AsyncEngine, proxy: Proxy) -> None:
    async with client(primary, proxy) as connection:
        [link] = proxy.links
        link.hole = True
        asking = asyncio.create_task(connection.execute(INSERT, 5))
        done, _ = await asyncio.wait([asking], timeout=0.1)
        assert not done
        link.cut()
        with pytest.raises(CUT_OFF):
            await asking
    assert await written(primary) == []


async def test_a_hole_swallows_that_the_other_side_went_away(primary: AsyncEngine, proxy: Proxy) -> None:
    """As a network does that drops every packet: else the server's own timeouts would tell the client."""
    async with client(primary, proxy, "somebody") as connection:
        [link] = proxy.links
        link.hole = True
        await execute(
            primary, "select pg_terminate_backend(pid) from pg_stat_activity where application_name = 'somebody'"
        )
        asking = asyncio.create_task(connection.execute(INSERT, 5))
        done, _ = await asyncio.wait([asking], timeout=0.2)
        assert not done
        link.cut()
        with pytest.raises(CUT_OFF):
            await asking


async def test_a_trickle_loses_nothing(primary: AsyncEngine, proxy: Proxy) -> None:
    async with client(primary, proxy) as connection:
        [link] = proxy.links
        link.slow = True
        assert await connection.fetchval("select repeat('é', 2000)") == "é" * 2_000


async def test_it_passes_on_what_is_larger_than_its_hands(primary: AsyncEngine, proxy: Proxy) -> None:
    async with client(primary, proxy) as connection:
        assert await connection.fetchval("select length($1::text)", "x" * 1_000_000) == 1_000_000
