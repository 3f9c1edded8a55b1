"""Alembic's entry: our own version table, in the schema of the outbox, and nothing of the application's."""

from __future__ import annotations

import asyncio
from typing import Any

from alembic import context
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.schema import metadata

config = context.config
schema: str = config.attributes.get("schema") or config.get_main_option("outbox_schema") or "public"
options: dict[str, Any] = {
    "target_metadata": metadata(schema),
    "version_table": "outbox_version",
    "version_table_schema": schema,
    "include_schemas": True,
}


lock_key = {"schema": schema}


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, **options)
    with context.begin_transaction():
        # Whoever migrates the same schema at the same time waits here, and then finds nothing left to do.
        connection.execute(text("select pg_advisory_xact_lock(hashtextextended('outbox/' || :schema, 0))"), lock_key)
        # A migration that cannot get its lock must give up, not stop every writer that comes after it.
        connection.execute(text("set local lock_timeout = '5s'"))
        context.run_migrations()


async def migrate_with_own_engine() -> None:
    engine = create_async_engine(config.get_main_option("sqlalchemy.url") or "")
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
    await engine.dispose()


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    with context.begin_transaction():
        context.run_migrations()
elif (given := config.attributes.get("connection")) is not None:
    migrate(given)
else:
    asyncio.run(migrate_with_own_engine())
