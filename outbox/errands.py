"""Errands: what the commands have done on a primary. Nothing is printed here, and every connection is closed after."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from alembic.runtime.migration import MigrationContext
from msgspec.structs import asdict
from sqlalchemy import Connection

from outbox.backfill import BackfillProgress
from outbox.errors import UnknownSecondary
from outbox.manager import SyncManager
from outbox.migrate import check_schema, migrate
from outbox.operate import Which
from outbox.reach import Tables, Unreached, place_of, reached, using
from outbox.reconciliation import ReconciliationResult, Terms
from outbox.relay import Relay
from outbox.status import BackendSyncStatus, Failure, failures, statuses

__all__ = [
    "backfill",
    "carry",
    "discard",
    "drain",
    "look_at_failures",
    "look_at_status",
    "migrate_tables",
    "pause",
    "reconcile",
    "redrive",
    "resume",
]

_log = logging.getLogger("outbox.cli")


async def migrate_tables(tables: Tables) -> tuple[str | None, str | None]:
    """Migrate to the newest revision; return the revisions before and after, None where there were no tables."""
    async with reached(tables.engine):
        before = await _revision(tables)
        await migrate(tables.engine, tables.schema)
        return before, await _revision(tables)


async def carry(manager: SyncManager) -> int:
    """Run a relay until a signal stops it; return 0, as a stop that was asked for is no failure."""
    relay = manager.relay()
    relay.stop_on_signals()
    async with _ready(manager, relay):
        await relay.run()
    _log.info("relay %s stopped, with nothing left in hand", relay.relay_id)
    return 0


async def drain(manager: SyncManager) -> int:
    """Run a relay until nothing is due, and tidy up; return 0."""
    relay = manager.relay()
    async with _ready(manager, relay):
        carried = await relay.drain()
        # Nobody else may ever do it, where there is no other relay.
        await relay.tidy()
    _log.info("relay %s stopped: %d deliveries carried, nothing more is due", relay.relay_id, carried)
    return 0


async def look_at_status(tables: Tables) -> list[BackendSyncStatus]:
    """Return every registered secondary. Raises `SchemaMissing`."""
    async with reached(tables.engine):
        await check_schema(tables.engine, tables.schema)
        return await statuses(tables.engine, tables.config)


async def look_at_failures(tables: Tables, backend: str | None, most: int) -> list[Failure]:
    """Return up to `most` failures. Raises `SchemaMissing`, and `UnknownSecondary` for a name nobody registered."""
    async with reached(tables.engine):
        await _check_known(tables, backend)
        return await failures(tables.engine, tables.schema, backend, most)


async def redrive(tables: Tables, which: Which, *, dry_run: bool) -> int:
    """Make failures due, or only count them. Raises `SchemaMissing`, and `UnknownSecondary` as `look_at_failures`."""
    async with _operating(tables, which) as manager:
        return await manager.redrive(which, dry_run=dry_run)


async def discard(tables: Tables, which: Which, reason: str, *, dry_run: bool) -> int:
    """Give failures up, or only count them. Raises what `redrive` does, and `SettingsError` for a bad reason."""
    async with _operating(tables, which) as manager:
        return await manager.discard(which, reason=reason, dry_run=dry_run)


async def pause(tables: Tables, backend: str) -> None:
    """Pause a secondary. Raises `SchemaMissing` and `UnknownSecondary`."""
    async with _operating(tables, Which(backend)) as manager:
        await manager.pause(backend)


async def resume(tables: Tables, backend: str) -> None:
    """Let a secondary go on. Raises `SchemaMissing` and `UnknownSecondary`."""
    async with _operating(tables, Which(backend)) as manager:
        await manager.resume(backend)


async def reconcile(
    manager: SyncManager, backend: str, tenant: str | None, resource_type: str | None, terms: Terms, *, repair: bool
) -> ReconciliationResult:
    """Compare; with `repair`, record what restores. Raises `Unreached` when there is nothing to compare."""
    _check_tracked(manager, resource_type)
    async with using(manager):
        # Repairs are owed to who is in the registry, so a name it does not have must not pass for repaired.
        await manager.backend_status(backend)
        return await manager.reconcile(
            backend, tenant_id=tenant, resource_type=resource_type, repair=repair, **asdict(terms)
        )


async def backfill(
    manager: SyncManager, backend: str, tenant: str | None, resource_type: str | None, **terms: Any
) -> BackfillProgress:
    """Fill a secondary on the terms of `SyncManager.backfill`. Raises `Unreached` when no class is tracked."""
    _check_tracked(manager, resource_type)
    async with using(manager):
        return await manager.backfill(backend, tenant_id=tenant, resource_type=resource_type, **terms)


def _check_tracked(manager: SyncManager, resource_type: str | None) -> None:
    types = sorted(each.resource_type for each in manager.tracking)
    if not types:
        raise Unreached("this manager tracks no class to compare a secondary with: name your own with --app")
    if resource_type not in (None, *types):
        raise Unreached(f"--type {resource_type}: is not tracked; tracked are {', '.join(types)}")


@asynccontextmanager
async def _operating(tables: Tables, which: Which) -> AsyncIterator[SyncManager]:
    """A manager without secondaries of its own: what an operator does needs none."""
    manager = SyncManager(tables.engine, config=tables.config)
    async with reached(tables.engine):
        await _check_known(tables, which.backend_id)
        yield manager
        await manager.aclose()


async def _check_known(tables: Tables, backend: str | None) -> None:
    await check_schema(tables.engine, tables.schema)
    known = [each.backend_id for each in await statuses(tables.engine, tables.config)]
    if backend not in (None, *known):
        raise UnknownSecondary(str(backend), f"the registry has {', '.join(known) or 'none'}")


@asynccontextmanager
async def _ready(manager: SyncManager, relay: Relay) -> AsyncIterator[None]:
    names = [each.backend_id for each in manager.registrations]
    if not names:
        raise Unreached("this manager has no secondaries, so a relay would have nothing to carry")
    async with using(manager):
        _log.info("relay %s carries from %s to %s", relay.relay_id, place_of(manager.engine), ", ".join(names))
        yield


async def _revision(tables: Tables) -> str | None:
    def current(connection: Connection) -> str | None:
        options = {"version_table": "outbox_version", "version_table_schema": tables.schema}
        return MigrationContext.configure(connection, opts=options).get_current_revision()

    async with tables.engine.connect() as connection:
        return await connection.run_sync(current)
