"""What one delivery costs PostgreSQL: write-ahead log and dead rows of claim, settle and the record of the attempt.

    python -m benchmarks --only event_cost [--runs 5] [--scale 1.0]

Everything that is written between a checkpoint and the end of a drain is counted, the relay's housekeeping included.
Pages written whole after a checkpoint depend on how often that is, so the goal is without them; the row with them says
what they add right after one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import NamedTuple

import asyncpg

from benchmarks.drained import Asked, drained, filled
from benchmarks.ground import Row, outbox_database
from outbox.testing.postgres import EmbeddedPostgres

EVENTS = 100_000
BATCH = 100
GOAL_WAL = 300
# One per delivery, and what a batch and a relay leave: an attempt's rows and the registry's.
GOAL_DEAD = 1.1
POSITION = "select (pg_current_wal_insert_lsn() - '0/0')::bigint"
DEAD = """
select coalesce(sum(n_tup_del + n_tup_upd), 0)::bigint as every,
       coalesce(sum(n_tup_del + n_tup_upd) filter (where relname = 'outbox'), 0)::bigint as wide
from pg_stat_user_tables where relname like 'outbox%'
"""
# Sessions that end hand in their counts; the last of them may do so a moment later.
_COUNTED = 2.0


class Cost(NamedTuple):
    """Per delivery: bytes of the log, dead rows in all tables, dead rows among the events themselves."""

    wal: float
    dead: float
    wide: float


async def cost(dsn: str, events: int) -> Cost:
    """Drain once, and see what that wrote."""
    await filled(dsn, events)
    connection = await asyncpg.connect(dsn)
    await asyncio.sleep(_COUNTED)
    position, dead = await connection.fetchval(POSITION), await connection.fetchrow(DEAD)
    carried = await drained(Asked(dsn, BATCH, most=events))
    assert carried.deliveries == events
    wal = await connection.fetchval(POSITION) - position
    await asyncio.sleep(_COUNTED)
    now = await connection.fetchrow(DEAD)
    await connection.close()
    return Cost(wal / events, *((now[name] - dead[name]) / events for name in ("every", "wide")))


async def rows(server: EmbeddedPostgres, runs: int, scale: float = 1.0) -> AsyncIterator[Row]:
    """Yield bytes of the log and dead rows per delivery, at one secondary."""
    events = max(5_000, int(EVENTS * scale))
    async with outbox_database(server) as name:
        dsn = server.dsn(name, driver="postgresql")
        for whole in ("off", "on"):
            await _pages_written_whole(dsn, whole)
            costs = [await cost(dsn, events) for _ in range(runs)]
            what = "without" if whole == "off" else "with"
            most = GOAL_WAL if whole == "off" else None
            named = f"WAL bytes per delivery, batch {BATCH}, {what} whole pages"
            yield Row(named, [each.wal for each in costs], most=most)
        yield Row("dead rows per delivery, all tables", [each.dead for each in costs], most=GOAL_DEAD)
        yield Row("dead rows per delivery, among events, before prune", [each.wide for each in costs], most=0)


async def _pages_written_whole(dsn: str, whole: str) -> None:
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"alter system set full_page_writes = {whole}")
    await connection.execute("select pg_reload_conf()")
    await connection.close()
