"""The isolation level that our statements need holds, whatever level the application's engine has."""

from __future__ import annotations

from contextlib import suppress

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from outbox.level import begun, connected

LEVELS = ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE", "AUTOCOMMIT"]
HOW = ["made with it", "made from another"]


async def level_of(connection: AsyncConnection) -> str:
    level = await connection.get_isolation_level()
    driver = (await connection.get_raw_connection()).driver_connection
    # The server knows nothing of a driver that commits by itself.
    return str(level) if driver is not None and driver.is_in_transaction() else "AUTOCOMMIT"


def having(primary: AsyncEngine, level: str, how: str) -> AsyncEngine:
    if how == "made from another":
        return primary.execution_options(isolation_level=level)
    return create_async_engine(primary.url, isolation_level=level)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("has", LEVELS)
@pytest.mark.parametrize("needs", ["READ COMMITTED", "REPEATABLE READ", "AUTOCOMMIT"])
async def test_it_is_the_one_that_is_asked_for_and_no_other_afterwards(
    primary: AsyncEngine, has: str, needs: str, how: str
) -> None:
    engine = having(primary, has, how)
    async with connected(engine, needs) as connection:
        assert await level_of(connection) == needs
    async with engine.connect() as connection:
        assert await level_of(connection) == has
    await engine.dispose()


async def test_a_transaction_is_committed_and_one_that_fails_is_not(primary: AsyncEngine) -> None:
    async with begun(primary, "READ COMMITTED") as connection:
        await connection.execute(text("create table kept (name text)"))
    with suppress(ZeroDivisionError):
        async with begun(primary, "READ COMMITTED") as connection:
            await connection.execute(text("insert into kept values ('no')"))
            raise ZeroDivisionError
    async with primary.connect() as connection:
        assert (await connection.execute(text("select count(*) from kept"))).scalar() == 0
