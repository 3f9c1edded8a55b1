"""One change, all the way: recorded, claimed, dispatched, settled."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, Registration, SyncEvent, SyncManager


async def test_a_committed_event_reaches_every_secondary_and_leaves_nothing_owed(primary: AsyncEngine) -> None:
    newest, archive = MemorySecondary("newest"), MemorySecondary("archive")
    manager = SyncManager(primary, [newest, Registration(archive, ordering="log")])
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Patient", "1", '{"decimal": 1.50}'), SyncEvent.create("Patient", "2", {}))
        session.record(SyncEvent.update("Patient", "1", '{"decimal": 2.50}'), SyncEvent.delete("Patient", "2"))
    assert [status.pending for status in await manager.all_statuses()] == [4, 4]

    assert await manager.relay().drain() == 8

    for secondary in (newest, archive):
        assert secondary.content_of("Patient", "1") == '{"decimal": 2.50}'
        assert secondary.content_of("Patient", "2") is None
    archived, kept = await manager.all_statuses()
    assert (archived.applied, archived.superseded, archived.pending) == (4, 0, 0)
    assert (kept.applied, kept.superseded, kept.pending) == (2, 2, 0)
