"""Guarantee 11: killed, cancelled or failed in the middle, a comparison leaves nothing behind."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox import Outcome, SyncEvent
from outbox.content import content_digest
from outbox.reconcile import SyncReconciler
from outbox.secondaries.base import ResourceDigest
from outbox.secondaries.sql import SqlSecondary
from tests.comparing import Note, World, otherwise_sorted, said
from tests.reconciling_process import Stopping
from tests.relaying import dsn_of, execute, value
from tests.waiting import eventually

OPEN = "select count(*) from pg_stat_activity where application_name = 'doomed'"
LOCKS = """
select count(*) from pg_locks
where database = (select oid from pg_database where datname = current_database()) and pid <> pg_backend_pid()
  and locktype in ('advisory', 'relation')
"""
SNAPSHOTS = """
select count(*) from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and (xact_start is not null or backend_xmin is not null)
  and backend_type = 'client backend'
"""


class Merged:
    """A secondary that holds `notes` notes and can only be scanned."""

    def __init__(self, backend_id: str) -> None:
        self.backend_id = backend_id
        self.notes = 0

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        raise NotImplementedError

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        digest = content_digest(said("first"))
        for name in sorted(str(number) for number in range(1, self.notes + 1)):
            if after is None or name > after:
                yield ResourceDigest(name, 1, digest)


@pytest.fixture
async def copied(primary: AsyncEngine) -> AsyncIterator[World]:
    """A primary that sorts otherwise and its copy: note 3 is missing there, and `extra` is only there."""
    copy = SqlSecondary("copy", dsn_of(primary))
    world = await World(primary, copy, summed=False).open()
    await world.write([str(number) for number in range(20)])
    await world.relay()
    await otherwise_sorted(primary)
    await execute(primary, "delete from outbox_resources where resource_id = '3'")
    extra = "insert into outbox_resources (tenant_id, resource_type, resource_id, position, content)"
    await execute(primary, f"{extra} values ('north', 'Note', 'extra', 1, '{{}}')")
    yield world
    await copy.aclose()


@pytest.mark.parametrize("step", ["listing", "restoring", "removing"])
async def test_a_killed_repair_leaves_nothing_and_the_next_one_does_it_all(copied: World, step: str) -> None:
    """R8: no transaction, no cursor, no lock, and no half of a repair."""
    engine = copied.engine
    events = await value(engine, "select count(*) from outbox")
    program = [sys.executable, "-m", "tests.reconciling_process", dsn_of(engine), step]
    process = await asyncio.create_subprocess_exec(
        *program, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    assert await asyncio.wait_for(process.stdout.readline(), 40) == b"here\n"
    assert await value(engine, OPEN) > 0
    process.kill()
    await process.wait()
    await eventually(lambda: _none(engine, OPEN))
    assert await value(engine, LOCKS) == 0
    # What is under lock in a page of its own is whole or not there.
    assert await value(engine, "select count(*) from outbox") - events == int(step == "removing")
    await copied.relay()
    found = await copied.reconcile(repair=True)
    assert (found.missing, found.extra) == (int(step != "removing"), 1)
    await copied.relay()
    assert (await copied.reconcile()).in_sync


@pytest.mark.parametrize("step", ["listing", "restoring", "removing"])
async def test_a_cancelled_repair_gives_everything_back(copied: World, step: str) -> None:
    """R8: the pool has all its connections, and none of them holds a cursor or a lock."""
    reached = asyncio.Event()
    stopping = Stopping(copied.engine, copied.manager.tracking)
    stopping.step = step
    patched = pytest.MonkeyPatch()
    patched.setattr("tests.reconciling_process.stay", lambda: _reached(reached))
    plain, copied.source = copied.source, stopping
    repairing = asyncio.create_task(copied.reconcile(repair=True))
    await asyncio.wait_for(reached.wait(), 20)
    repairing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await repairing
    patched.undo()
    pool: Any = copied.engine.pool
    await eventually(lambda: pool.checkedout() == 0)
    assert await value(copied.engine, LOCKS) == 0
    assert await value(copied.engine, "select count(*) from pg_cursors where is_holdable") == 0
    copied.source = plain
    await copied.relay()
    await copied.reconcile(repair=True)
    await copied.relay()
    assert (await copied.reconcile()).in_sync


async def test_a_listing_that_fails_in_the_middle_says_why_and_keeps_no_cursor(copied: World) -> None:
    """R8: the connection goes back to the pool as it came, so the next listing can declare its cursor."""
    failing = [True]

    def spoil(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> tuple[str, Any]:
        return ("select 1/0" if failing and statement.startswith("fetch") else statement), parameters

    event.listen(copied.engine.sync_engine, "before_cursor_execute", spoil, retval=True)
    with pytest.raises(DBAPIError, match="division by zero"):
        await copied.reconcile()
    failing.clear()
    pool: Any = copied.engine.pool
    await eventually(lambda: pool.checkedout() == 0)
    assert await value(copied.engine, "select count(*) from pg_cursors where is_holdable") == 0
    assert (await copied.reconcile()).missing == 1


@pytest.mark.parametrize("how", ["by bytes", "sorted there", "sorted here"])
async def test_no_transaction_and_no_snapshot_is_open_between_pages(primary: AsyncEngine, how: str) -> None:
    """R8: however long a run takes, vacuum is held up by no more than a page."""
    identity: Any = (lambda note: note.number) if how == "sorted here" else Note.number
    world = await World(primary, Merged("mirror"), summed=False, resource_id=identity).open()
    fill = "insert into note select 'north', n::text, :content from generate_series(1, 50000) as n"
    await execute(primary, fill, content=said("first"))
    if how == "sorted there":
        await otherwise_sorted(primary)
    looks: list[int] = []

    async def look() -> None:
        looks.append(await value(primary, SNAPSHOTS))

    world.secondary.notes = 50_000
    walk = SyncReconciler(primary, world.source, world.secondary, "public", None, look)
    found = await walk.reconcile()
    assert found.primary_count == 50_000
    assert len(looks) >= 100
    assert max(looks) == 0


@pytest.mark.parametrize("how", ["role", "server"])
async def test_who_may_only_read_may_compare(copied: World, how: str) -> None:
    """R8: a dry run writes no more than its note, and goes without where that is not allowed."""
    await execute(copied.engine, "drop role if exists outbox_reader")
    settings = {"default_transaction_read_only": "on"}
    if how == "role":
        await execute(copied.engine, "create role outbox_reader")
        await execute(copied.engine, "grant select on all tables in schema public to outbox_reader")
        settings = {"role": "outbox_reader"}
    engine = create_async_engine(dsn_of(copied.engine), connect_args={"server_settings": settings})
    reader = World(engine, copied.secondary, summed=False)
    found = await reader.reconcile()
    assert (found.missing, found.extra) == (1, 1)
    assert await value(copied.engine, "select count(*) from outbox_reconciliation") == 0
    with pytest.raises(DBAPIError):
        await reader.reconcile(repair=True)
    await engine.dispose()
    await execute(copied.engine, "drop owned by outbox_reader" if how == "role" else "select 1")
    await execute(copied.engine, "drop role if exists outbox_reader")


async def _reached(reached: asyncio.Event) -> None:
    reached.set()
    await asyncio.Event().wait()


async def _none(engine: AsyncEngine, count: str) -> bool:
    return bool(await value(engine, count) == 0)
