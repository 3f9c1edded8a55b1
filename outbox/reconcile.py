"""Reconcile: prove that a secondary equals the primary, and restore it through the outbox where it does not.

Both sides are scanned in key order and merged. What differs is only a suspect: its deliveries may be under way, or
it changed between the two reads. Suspects are left to drain, then both sides are scanned again; what still differs,
while nothing was owed and nothing was recorded for its key, is drift.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from outbox.event import SyncEvent
from outbox.record import record
from outbox.secondaries.base import Refreshable, ResourceDigest, Secondary
from outbox.source import PrimaryDigest, Source
from outbox.statement import Statement

__all__ = ["BARRIER", "OWED", "RUNNING", "Drift", "ReconciliationResult", "SyncReconciler"]

_Kind = Literal["missing", "extra", "stale", "altered"]

# For each suspect: the newest event recorded for its key, and whether the secondary still owes any.
OWED = Statement("""
with suspect as materialized (
    select suspect.resource_id,
           hashtextextended(
               cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || suspect.resource_id, 0
           ) as key_hash
    from unnest(cast(:resource_ids as text[])) as suspect (resource_id)
), owed as materialized (
    select delivery.key_hash from {schema}.outbox_delivery as delivery
    where delivery.backend_id = :backend_id and delivery.key_hash in (select key_hash from suspect)
    union all
    select unnest(attempt.key_hashes)
    from {schema}.outbox_secondary as secondary
    join {schema}.outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where secondary.backend_id = :backend_id and attempt.finished_at is null
    union all
    select hold.key_hash from {schema}.outbox_hold as hold where hold.backend_id = :backend_id
), newest as materialized (
    select event.resource_id, max(event.event_id) as position
    from {schema}.outbox as event
    where event.tenant_id = :tenant_id and event.resource_type = :resource_type
      and event.resource_id in (select resource_id from suspect)
    group by event.resource_id
)
select suspect.resource_id, coalesce(newest.position, 0) as position,
       suspect.key_hash in (select key_hash from owed) as owed
from suspect left join newest on newest.resource_id = suspect.resource_id
""")

# Taken and ended on a connection beside: from then on a snapshot names everybody below it who still runs.
BARRIER = Statement("select cast(pg_current_xact_id() as text)")

RUNNING = Statement("""
select transaction_id
from (select cast(pg_snapshot_xip(pg_current_snapshot()) as text) as transaction_id) as running
where cast(transaction_id as bigint) < cast(:barrier as bigint)
""")

_PAGE = 200
_SAMPLES = 10


class Drift(msgspec.Struct, frozen=True):
    """One resource that differs. `position` is what the secondary holds, None where it holds nothing."""

    kind: _Kind
    tenant_id: str
    resource_type: str
    resource_id: str
    position: int | None


class ReconciliationResult(msgspec.Struct):
    """What a comparison found: exact counts, the first ten of each kind as `samples`.

    `in_flight` counts resources that differed only because a delivery was under way or a write came in between.
    `repaired` counts repair events recorded; `refused` counts extras left alone because too many looked deletable.
    """

    backend_id: str
    primary_count: int = 0
    secondary_count: int = 0
    missing: int = 0
    extra: int = 0
    stale: int = 0
    altered: int = 0
    in_flight: int = 0
    repaired: int = 0
    refused: int = 0
    duration: timedelta = timedelta(0)
    samples: list[Drift] = msgspec.field(default_factory=list)

    @property
    def in_sync(self) -> bool:
        """Whether nothing is missing, extra, stale or altered."""
        return not (self.missing or self.extra or self.stale or self.altered)

    def count(self, drifts: Sequence[Drift]) -> None:
        """Add what one scope showed."""
        for drift in drifts:
            setattr(self, drift.kind, getattr(self, drift.kind) + 1)
            if sum(sample.kind == drift.kind for sample in self.samples) < _SAMPLES:
                self.samples.append(drift)


class SyncReconciler:
    """Compares one secondary with the primary. It reads the secondary and writes nothing but outbox events."""

    def __init__(
        self,
        engine: AsyncEngine,
        source: Source,
        secondary: Secondary,
        schema: str,
        *,
        patience: timedelta = timedelta(seconds=30),
        most_deletes: float = 0.05,
    ) -> None:
        self._engine = engine
        self._source = source
        self._secondary = secondary
        self._schema = schema
        self._patience = patience.total_seconds()
        self._most_deletes = most_deletes

    async def reconcile(
        self, tenant_id: str | None = None, resource_type: str | None = None, *, repair: bool = False
    ) -> ReconciliationResult:
        """Compare every scope, or the given ones; with `repair`, record an event for each resource that differs.

        Repair reads the primary's row under lock and owes the event to this secondary only. Extras become deletes only
        while they are few (`most_deletes`, a share of the secondary's resources, never fewer than ten), so that a wrong
        listing empties nothing.
        """
        started = time.monotonic()
        result = ReconciliationResult(self._secondary.backend_id)
        for scope in await self._source.scopes(tenant_id, resource_type):
            await self._reconcile_scope(*scope, result, repair=repair)
        result.duration = timedelta(seconds=time.monotonic() - started)
        return result

    async def _reconcile_scope(self, tenant: str, kind: str, result: ReconciliationResult, *, repair: bool) -> None:
        suspects, counts = await self._compare(tenant, kind)
        drifts = await self._confirm(tenant, kind, list(suspects)) if suspects else []
        result.primary_count += counts[0]
        result.secondary_count += counts[1]
        result.in_flight += len(suspects) - len(drifts)
        result.count(drifts)
        if repair and drifts:
            await self._repair(tenant, kind, drifts, counts[1], result)

    async def _compare(self, tenant: str, kind: str) -> tuple[dict[str, ResourceDigest | None], tuple[int, int]]:
        """Merge both sides; return what differs, as the secondary holds it, and how many there were on each side."""
        if isinstance(self._secondary, Refreshable):
            await self._secondary.refresh()
        suspects: dict[str, ResourceDigest | None] = {}
        counts = [0, 0]
        async for ours, theirs in _merged(self._source.scan(tenant, kind), self._secondary.scan(tenant, kind)):
            counts[0] += ours is not None
            counts[1] += theirs is not None
            if ours is None or theirs is None or ours.digest != theirs.digest:
                either = ours or theirs
                assert either is not None
                suspects[either.resource_id] = theirs
        return suspects, (counts[0], counts[1])

    async def _confirm(self, tenant: str, kind: str, suspects: list[str]) -> list[Drift]:
        """Look again once nothing is owed for the suspects; whoever moved meanwhile is no drift."""
        before = await self._quiet(tenant, kind, suspects)
        again, _ = await self._compare(tenant, kind)
        after = await self._owed(tenant, kind, suspects)
        still = {name: again[name] for name in suspects if name in again and before[name] == after[name]}
        present = await self._present(tenant, kind, list(still))
        return [
            Drift(
                _kind_of(held, after[name][0], in_primary=name in present),
                tenant,
                kind,
                name,
                held.position if held else None,
            )
            for name, held in still.items()
            if not after[name][1]
        ]

    async def _quiet(self, tenant: str, kind: str, suspects: list[str]) -> dict[str, tuple[int, bool]]:
        deadline = time.monotonic() + self._patience
        while True:
            owed = await self._owed(tenant, kind, suspects)
            if time.monotonic() >= deadline or not any(waiting for _, waiting in owed.values()):
                return owed
            await asyncio.sleep(0.1)

    async def _owed(self, tenant: str, kind: str, names: list[str]) -> dict[str, tuple[int, bool]]:
        parameters = {
            "tenant_id": tenant,
            "resource_type": kind,
            "resource_ids": names,
            "backend_id": self._secondary.backend_id,
        }
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(OWED.on(self._schema)), parameters)
            return {row.resource_id: (row.position, row.owed) for row in rows}

    async def _present(self, tenant: str, kind: str, names: list[str]) -> set[str]:
        async with AsyncSession(self._engine) as session:
            return set(await self._source.current(session, tenant, kind, names)) if names else set()

    async def _repair(
        self, tenant: str, kind: str, drifts: list[Drift], held: int, result: ReconciliationResult
    ) -> None:
        extras = [drift.resource_id for drift in drifts if drift.kind == "extra"]
        if len(extras) > max(10, held * self._most_deletes):
            result.refused += len(extras)
            extras = []
        others = [drift.resource_id for drift in drifts if drift.kind != "extra"]
        for start in range(0, len(others), _PAGE):
            result.repaired += await self._restore(tenant, kind, others[start : start + _PAGE])
        for start in range(0, len(extras), _PAGE):
            result.repaired += await self._remove(tenant, kind, extras[start : start + _PAGE])

    async def _restore(self, tenant: str, kind: str, names: list[str]) -> int:
        """Record the primary's state under its row locks; who is gone by now has an event of its own."""
        async with AsyncSession(self._engine) as session, session.begin():
            events = list((await self._source.current(session, tenant, kind, names)).values())
            await self._record(await session.connection(), events)
        return len(events)

    async def _remove(self, tenant: str, kind: str, names: list[str]) -> int:
        """Record deletes of what the primary does not have, without ever passing an insert that is under way.

        The position is drawn first; then everybody who ran at that moment is waited for, because any of them may have
        drawn a lower one; only then is the primary read again.
        """
        async with AsyncSession(self._engine) as session, session.begin() as transaction:
            connection = await session.connection()
            await self._record(connection, [SyncEvent.delete(kind, name, tenant_id=tenant) for name in names])
            alone = await self._others_ended(connection)
            if not alone or await self._source.current(session, tenant, kind, names):
                await transaction.rollback()
                return 0
        return len(names)

    async def _others_ended(self, connection: AsyncConnection) -> bool:
        async with self._engine.begin() as beside:
            barrier = {"barrier": int(await beside.scalar(text(BARRIER.on(self._schema))))}
        deadline = time.monotonic() + self._patience
        while (await connection.scalars(text(RUNNING.on(self._schema)), barrier)).first() is not None:
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def _record(self, connection: Any, events: list[SyncEvent]) -> None:
        if events:
            await record(connection, events, schema=self._schema, backend_ids=[self._secondary.backend_id])


def _kind_of(held: ResourceDigest | None, newest: int, *, in_primary: bool) -> _Kind:
    if held is None:
        return "missing"
    if not in_primary:
        return "extra"
    return "stale" if newest > held.position else "altered"


async def _merged(
    ours: AsyncIterator[PrimaryDigest], theirs: AsyncIterator[ResourceDigest]
) -> AsyncIterator[tuple[PrimaryDigest | None, ResourceDigest | None]]:
    """Walk two listings, both ordered by the bytes of the id, side by side."""
    left, right = await anext(ours, None), await anext(theirs, None)
    while left is not None or right is not None:
        if right is None or (left is not None and left.resource_id.encode() < right.resource_id.encode()):
            yield left, None
            left = await anext(ours, None)
        elif left is None or right.resource_id.encode() < left.resource_id.encode():
            yield None, right
            right = await anext(theirs, None)
        else:
            yield left, right
            left, right = await anext(ours, None), await anext(theirs, None)
