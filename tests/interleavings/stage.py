"""Stage: real connections that are used again for every order, what must hold in the tables, and who waits for whom."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import SyncManager
from outbox.primary import Primary
from outbox.retry import RetryPolicy
from tests.comparing import Base
from tests.interleavings.gates import Gates
from tests.interleavings.orders import ASKED
from tests.relaying import dsn_of, manager_of, quick
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

MIRROR = "mirror"
# A pinned transaction must outlast the others' turns, however slow the machine is.
CONFIG = quick(lease=60.0, statement_timeout=60.0)
POLICY = RetryPolicy.from_config(CONFIG)

CLEAR = """
delete from outbox; delete from outbox_delivery; delete from outbox_attempt; delete from outbox_hold;
delete from outbox_discarded; delete from outbox_backfill; delete from note;
update outbox_secondary
set ordering = 'state', status = 'live', breaker = 'closed', breaker_failures = 0, folded_through = 0, looked_at = null,
    applied = 0, stale = 0, superseded = 0, retried = 0, rejected = 0, released = 0, lost = 0, discarded = 0;
"""

# What is wrong at this moment, in one snapshot. Every owed delivery is at one place; whatever was recorded is owed or
# done; a key is in no two open attempts; what is owed is there; the view says the same.
WRONG = """
with opened as materialized (
    select attempt_id, unnest(event_ids) as event_id from outbox_attempt where finished_at is null
), place as materialized (
    select event_id from outbox_delivery
    union all select event_id from opened
    union all select unnest(event_ids) from outbox_hold
), known as materialized (
    select coalesce(cast($1 as bigint), (select count(*) from outbox)) as recorded,
           (select count(*) from place) as owed, lag.pending, lag.applied + lag.stale + lag.superseded as done
    from outbox_lag as lag
)
select 'event ' || event_id || ' is owed ' || count(*) || ' times' as problem
from place group by event_id having count(*) > 1
union all
select 'event ' || event_id || ' is owed and gone'
from place where not exists (select from outbox where outbox.event_id = place.event_id)
union all
select resource_id || ' is in hand ' || count(distinct opened.attempt_id) || ' times'
from opened join outbox using (event_id)
group by tenant_id, resource_type, resource_id having count(distinct opened.attempt_id) > 1
union all
select 'outbox_lag says ' || pending || ', there are ' || owed from known where pending <> owed
union all
select recorded || ' were recorded, ' || owed || ' are owed and ' || done || ' done'
from known where recorded <> owed + done
"""

WAITS = """
select exists (
    select from pg_stat_activity
    where datname = current_database() and application_name = $1 and wait_event_type = 'Lock'
      and cardinality(pg_blocking_pids(pid)) > 0
)
"""


class Stage:
    """A primary with one secondary, and a connection or an engine for each actor."""

    def __init__(self, primary: AsyncEngine, watching: asyncpg.Connection[Any]) -> None:
        self.primary = primary
        self.watching = watching
        self.manager: SyncManager = manager_of(primary, ScriptedSecondary(MIRROR))
        self._connections: dict[str, asyncpg.Connection[Any]] = {}
        self._gates: dict[str, Gates] = {}

    async def connection(self, actor: str) -> asyncpg.Connection[Any]:
        """An actor's connection, pinned as a relay's is."""
        if actor not in self._connections:
            self._connections[actor] = connection = await connect(self.primary, actor)
            await Primary(self.primary, CONFIG).pin(connection)
            await connection.execute(f"set application_name = '{actor}'")
        return self._connections[actor]

    def gates(self, actor: str) -> Gates:
        """An actor's engine, on which what it runs can be stopped before any statement."""
        if actor not in self._gates:
            settings = {"application_name": actor, "deadlock_timeout": "100ms"}
            engine = create_async_engine(self.primary.url, connect_args={"server_settings": settings})
            self._gates[actor] = Gates(engine)
        return self._gates[actor]

    async def clear(self, ordering: str = "state") -> None:
        """Leave nothing of the order that was played before."""
        await self.watching.execute(CLEAR)
        if ordering != "state":
            await self.watching.execute("update outbox_secondary set ordering = $1", ordering)

    async def waits(self, actor: str) -> bool:
        """Whether one of the actor's connections waits for somebody's lock."""
        return bool(await self.watching.fetchval(WAITS, actor))

    async def wrong(self, recorded: int | None = None) -> list[str]:
        """What is wrong in the tables; `recorded` is how many events were, where some may be pruned."""
        return [row[0] for row in await self.watching.fetch(WRONG, recorded)]

    async def close(self) -> None:
        """End every connection, and see that no two ever waited in a circle and that every gate stopped somebody."""
        for connection in self._connections.values():
            await connection.close()
        for gates in self._gates.values():
            await gates.engine.dispose()
        await eventually(self._alone)
        deadlocks = "select deadlocks from pg_stat_database where datname = current_database()"
        assert await self.watching.fetchval(deadlocks) == 0
        # One order that was asked for need not come by all of them.
        unmet = {actor: gates.unmet for actor, gates in self._gates.items() if gates.unmet}
        assert not unmet or ASKED in os.environ, f"no statement that ran holds {unmet}: nobody was stopped there"

    async def _alone(self) -> bool:
        others = """
            select count(*) from pg_stat_activity
            where datname = current_database() and backend_type = 'client backend' and application_name = any ($1)
        """
        return await self.watching.fetchval(others, [*self._connections, *self._gates]) == 0


async def connect(primary: AsyncEngine, name: str, settings: Mapping[str, str] | None = None) -> Any:
    """A driver connection that is known by a name."""
    given = {"application_name": name, "deadlock_timeout": "100ms"} | dict(settings or {})
    return await asyncpg.connect(dsn_of(primary).replace("postgresql+asyncpg", "postgresql"), server_settings=given)


@asynccontextmanager
async def opened(primary: AsyncEngine) -> AsyncIterator[Stage]:
    """A stage with its tables, its secondary registered, and nobody on it."""
    watching = await connect(primary, "watching")
    stage = Stage(primary, watching)
    try:
        async with primary.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await stage.manager.register()
        yield stage
        await stage.close()
    finally:
        await watching.close()
