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
from outbox.testing.records import Dumped, Entry, Reconciled, Rows

__all__ = ["OWED", "compare", "dump", "owed"]

_PATIENCE = timedelta(seconds=2)

# What somebody still has to carry: dead keys wait for nobody.
OWED = Statement("""
select (select count(*) from {schema}.outbox_delivery)
     + (select count(*) from {schema}.outbox_attempt where finished_at is null)
     + (select count(*) from {schema}.outbox_hold where state in ('released', 'retrying'))
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


async def dump(manager: SyncManager, history: History) -> None:
    """Write what a comparison says, the final tables, the primary's rows and what each secondary holds."""
    for each in manager.registrations:
        await compare(manager, each.backend_id, history)
    await dump_tables(manager.engine, "public", history)
    async with manager.session() as session:
        for item in await session.scalars(select(Item)):
            digest = content_digest(item.content)
            history.write(Rows(entries=[Entry(0, item.tenant_id, "Item", item.resource_id, digest)]))
    for each in manager.registrations:
        scopes = await each.secondary.scopes() if isinstance(each.secondary, Listable) else []
        await dump_secondary(each.secondary, scopes, history)
    history.write(Dumped())
