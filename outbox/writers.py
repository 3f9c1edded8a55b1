"""Writers: who may have drawn a position that nobody can see yet."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Set as AbstractSet

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.statement import Statement

__all__ = ["WRITERS", "still_writing", "writers", "writers_ended"]

_PAUSE = 0.05

# Whoever has drawn a position holds this lock until it ends; transactions of other databases, and those that only read
# or never recorded anything, do not. One that is prepared has no process, and a name it did not have before.
WRITERS = Statement("""
select case when held.pid is null then 'prepared' else held.virtualtransaction end as writer
from pg_locks as held
where held.locktype = 'relation' and held.mode = 'RowExclusiveLock' and held.granted
  and held.database = (select oid from pg_database where datname = current_database())
  and held.relation = to_regclass('{schema}.outbox')
  and held.pid is distinct from pg_backend_pid()
""")


async def writers(connection: AsyncConnection, schema: str) -> set[str]:
    """Return the transactions that have recorded something and not ended, but for the connection's own."""
    return set(await connection.scalars(text(WRITERS.on(schema))))


def still_writing(before: AbstractSet[str], now: AbstractSet[str]) -> set[str]:
    """Return those of `before` that have not ended: who was prepared meanwhile has not, and cannot be told apart."""
    return {writer for writer in now if writer in before or (before and writer == "prepared")}


async def writers_ended(connection: AsyncConnection, schema: str, deadline: float) -> bool:
    """Whether all who have recorded something by now, and not committed it, have ended by a monotonic deadline."""
    waited_for = await writers(connection, schema)
    while waited_for:
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_PAUSE)
        waited_for = still_writing(waited_for, await writers(connection, schema))
    return True
