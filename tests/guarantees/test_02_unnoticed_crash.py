"""Guarantee 2: a crash that no statement of a relay met leaves nothing behind that its next claims would pass by."""

from __future__ import annotations

from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.carrier import Carrier
from outbox.migrate import migrate
from outbox.primary import Primary
from outbox.record import record
from outbox.register import Registration
from outbox.retry import RetryPolicy
from outbox.secondaries.memory import MemorySecondary
from tests.forgetful import forgetful_server, log_held
from tests.relaying import change, manager_of, quick, raw


async def record_each(engine: AsyncEngine, *names: str) -> list[int]:
    """Record one event per name, commit, and return their positions."""
    async with raw(engine) as connection, connection.transaction():
        return (await record(connection, [change(name) for name in names])).positions


async def look(carrier: Carrier) -> int:
    """Carry what is due, then raise the floors if it is time to; here it always is."""
    carrier._floors._raised_at = 0.0
    return await carrier.run_once()


async def test_positions_that_are_given_again_after_a_crash_are_not_passed_by() -> None:
    """L1, A7: what a floor was about to pass, seen before the crash, is not what has these positions now."""
    memory, config = MemorySecondary(), quick()
    with forgetful_server() as server:
        engine = create_async_engine(server.dsn())
        await migrate(engine)
        await manager_of(engine, memory).register()
        primary = Primary(engine, config)
        carrier = Carrier(Registration(memory), primary, config, RetryPolicy.from_config(config), uuid4())
        await primary.open()
        async with raw(engine) as writer:
            with log_held(server) as crash:
                await writer.transaction().start()
                lost = (await record(writer, [change(f"lost{number}") for number in range(20)])).positions
                carrier._floors._raised_at = 0.0
                await carrier._floors.mind(busy=True)
                crash()
        server.start()
        await engine.dispose()
        # By now the driver knows that its connections are gone, and makes others without a word.
        await primary.wait()
        async with raw(engine) as connection:
            for _ in range(20):
                await connection.execute("select pg_current_xact_id()")
        early = await record_each(engine, "early")
        assert early[0] <= lost[-1], "the crash kept the positions that were drawn, so nothing is shown"
        assert await look(carrier) == 1
        late = await record_each(engine, "late", "later")
        assert late[-1] <= lost[-1]
        assert await look(carrier) == len(late)
        await primary.close()
        await engine.dispose()
    assert [name for name in ("early", "late", "later") if memory.content_of("Thing", name) is None] == []
