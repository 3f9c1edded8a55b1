"""Guarantee 11: a writer that prepares its commit has not ended, though it goes by another name from then on."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from outbox import record
from outbox.migrate import migrate
from outbox.writers import still_writing, writers
from tests.relaying import change, manager_of, own_server
from tests.scripted import ScriptedSecondary


async def test_a_writer_seen_before_it_prepared_is_seen_until_its_commit() -> None:
    """R3, A11: whoever waits looked for the first time while it was an ordinary transaction."""
    with own_server(max_prepared_transactions="4") as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        await manager_of(engine, ScriptedSecondary("search")).register()
        looking = engine.execution_options(isolation_level="AUTOCOMMIT")
        async with looking.connect() as watch:
            async with engine.connect() as writer:
                await record(writer, change("late"))
                before = await writers(watch, "public")
                assert len(before) == 1
                await writer.execute(text("prepare transaction 'late'"))
                await writer.rollback()
            assert still_writing(before, await writers(watch, "public"))
            await watch.execute(text("commit prepared 'late'"))
            assert not still_writing(before, await writers(watch, "public"))
        await engine.dispose()
