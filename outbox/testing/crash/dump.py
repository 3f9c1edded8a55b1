"""Dump: read everything there is at the end of a run, and tell the history."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.content import content_digest
from outbox.manager import SyncManager
from outbox.secondaries.base import Listable
from outbox.statement import Statement
from outbox.testing.crash.writing import Item
from outbox.testing.dump import dump_secondary, dump_tables
from outbox.testing.history import History
from outbox.testing.records import Counted, Dumped, Entry, Reconciled, Rows

__all__ = ["COUNTED", "OWED", "compare", "count", "dump", "owed"]

_PATIENCE = timedelta(seconds=2)

# What somebody still has to carry: dead keys wait for nobody.
OWED = Statement("""
select (select count(*) from {schema}.outbox_delivery)
     + (select count(*) from {schema}.outbox_attempt where finished_at is null)
     + (select count(*) from {schema}.outbox_hold where state in ('released', 'retrying'))
""")


# What everybody is shown, and the events themselves wherever they are: in one statement, so of one instant.
COUNTED = Statement("""
select lag.backend_id, lag.pending, (
    select count(distinct owed.event_id) from (
        select delivery.event_id from {schema}.outbox_delivery as delivery
        where delivery.backend_id = lag.backend_id
        union all
        select unnest(hold.event_ids) from {schema}.outbox_hold as hold
        where hold.backend_id = lag.backend_id
        union all
        select unnest(attempt.event_ids) from {schema}.outbox_attempt as attempt
        where attempt.backend_id = lag.backend_id and attempt.finished_at is null
    ) as owed
) as there
from {schema}.outbox_lag as lag
where lag.status <> 'removed'
""")


async def owed(engine: AsyncEngine) -> int:
    """Return how much is still on its way."""
    async with engine.connect() as connection:
        return int((await connection.execute(text(OWED.on("public")))).scalar_one())


async def compare(manager: SyncManager, backend_id: str, history: History) -> None:
    """Compare a secondary with the primary, and write which resources differ."""
    result = await manager.reconcile(backend_id, patience=_PATIENCE)
    drift = [(each.tenant_id, each.resource_type, each.resource_id) for each in result.samples]
    history.write(Reconciled(backend_id=backend_id, drift=drift))


async def count(manager: SyncManager, history: History) -> None:
    """Write how much is said to be owed to each secondary, and how much is."""
    async with manager.engine.connect() as connection:
        found = (await connection.execute(text(COUNTED.on("public")))).all()
    for backend_id, pending, there in found:
        history.write(Counted(backend_id=backend_id, reported=pending, recounted=there))


async def dump(manager: SyncManager, history: History) -> None:
    """Write what a comparison says, the final tables, the primary's rows and what each secondary holds."""
    for each in manager.registrations:
        await compare(manager, each.backend_id, history)
    await count(manager, history)
    await dump_tables(manager.engine, "public", history)
    async with manager.session() as session:
        for item in await session.scalars(select(Item)):
            digest = content_digest(item.content)
            history.write(Rows(entries=[Entry(0, item.tenant_id, "Item", item.resource_id, digest)]))
    for each in manager.registrations:
        scopes = await each.secondary.scopes() if isinstance(each.secondary, Listable) else []
        await dump_secondary(each.secondary, scopes, history)
    history.write(Dumped())
