"""Settled: wait until nobody can still record by what the registry said before.

An event is owed to whom the registry names in the snapshot of the statement that records it. A transaction that
recorded by an older snapshot may commit much later: without a delivery for a secondary that is new, or with one for a
secondary that is gone. Whoever relies on the registry waits here after the commit that changed it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.level import connected
from outbox.statement import Statement

__all__ = ["BEFORE", "settled"]

# recorded  who holds an insert's lock: it is taken before the statement's snapshot and kept to the transaction's end
# reading   who keeps a snapshot: in repeatable read a transaction may first record long after it was taken
# A prepared transaction has no process and a new name; it counts whenever it is met. Only this database is looked at:
# who runs in another one cannot record here.
BEFORE = Statement("""
with here as materialized (
    select oid from pg_catalog.pg_database where datname = current_database()
)
select distinct holder.name, holder.pid
from (
    select lock.virtualtransaction as name, lock.pid
    from pg_catalog.pg_locks as lock
    where lock.locktype = 'relation' and lock.mode = 'RowExclusiveLock' and lock.granted
      and lock.database = (select oid from here) and lock.relation = cast('{schema}.outbox' as regclass)
    union all
    select lock.virtualtransaction || ' ' || cast(activity.backend_xmin as text), activity.pid
    from pg_catalog.pg_stat_activity as activity
    join pg_catalog.pg_locks as lock
      on lock.pid = activity.pid and lock.locktype = 'virtualxid' and lock.mode = 'ExclusiveLock' and lock.granted
    where activity.datid = (select oid from here) and activity.backend_xmin is not null
      and coalesce(activity.backend_type, 'client backend') = 'client backend'
) as holder
where holder.pid is distinct from pg_backend_pid()
""")

_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.005, 0.2


async def settled(engine: AsyncEngine, schema: str, waiting_for: Callable[[list[int]], None] = lambda _: None) -> None:
    """Return once every transaction has ended that ran when this was called and may record by an older registry.

    Call it after the commit that changed the registry. There is no limit of its own: a transaction that stays open is
    waited for, and nothing else is held up. `waiting_for` is told the processes that are waited for, whenever they are
    others; a prepared transaction has none.
    """
    ran = before = await _holders(engine, schema)
    told: list[int] = []
    sleep = _SHORTEST_SLEEP
    while left := {name: pid for name, pid in before.items() if name in ran or pid is None}:
        if (pids := sorted({pid for pid in left.values() if pid is not None})) != told:
            waiting_for(pids)
            told = pids
        await asyncio.sleep(sleep)
        sleep = min(sleep * 2, _LONGEST_SLEEP)
        before = await _holders(engine, schema)


async def _holders(engine: AsyncEngine, schema: str) -> dict[str, int | None]:
    # Each look is a transaction of its own, because within one the activity of others is read but once.
    async with connected(engine, "AUTOCOMMIT") as connection:
        rows = await connection.execute(text(BEFORE.on(schema)))
        return {row.name: row.pid for row in rows}
