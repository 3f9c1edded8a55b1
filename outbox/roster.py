"""Roster: how a secondary comes, is filled and proved, and goes, while writes go on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
from sqlalchemy import text

from outbox.backfill import BackfillProgress
from outbox.errors import SettingsError, StillOwed, UnknownSecondary
from outbox.lanes import HIGHEST
from outbox.prover import Prover
from outbox.reconciliation import ReconciliationResult
from outbox.register import Registration, register
from outbox.relay import Relay
from outbox.retire import Removal, retire
from outbox.settled import settled
from outbox.statement import Statement
from outbox.status import BackendSyncStatus, statuses

__all__ = ["DRAIN", "FORGET_BACKFILL", "OWED_THROUGH", "PROMOTE", "REJOIN", "REMOVE", "Addition", "Roster", "Tell"]

PROMOTE = Statement("""
update {schema}.outbox_secondary set status = 'live'
where backend_id = :backend_id and status in ('shadow', 'live')
returning status
""")

DRAIN = Statement("""
update {schema}.outbox_secondary set status = 'draining'
where backend_id = :backend_id and status in ('shadow', 'live', 'paused', 'draining')
returning status
""")

# Whatever comes after may be cut off, and it can come back without another removal.
REMOVE = Statement("""
with forgotten as (
    delete from {schema}.outbox_backfill where backend_id = :backend_id
)
update {schema}.outbox_secondary set status = 'removed'
where backend_id = :backend_id
returning status
""")

# What was filled before it was owed nothing may have changed since: it is filled from the beginning.
REJOIN = Statement("""
with again as (
    update {schema}.outbox_secondary set status = 'shadow', registered_at = clock_timestamp()
    where backend_id = :backend_id and status in ('draining', 'removed')
    returning backend_id
)
delete from {schema}.outbox_backfill where backend_id = any (array(select backend_id from again))
""")

FORGET_BACKFILL = Statement("delete from {schema}.outbox_backfill where backend_id = :backend_id")

# What is not done of all up to a position; what is dead nobody tries again by itself.
OWED_THROUGH = Statement("""
select (
           select count(*) from {schema}.outbox_delivery as delivery
           where delivery.backend_id = :backend_id and delivery.event_id <= cast(:through as bigint)
       ) + (
           select count(*)
           from {schema}.outbox_attempt as attempt cross join lateral unnest(attempt.event_ids) as owed (event_id)
           where attempt.backend_id = :backend_id and attempt.finished_at is null
             and owed.event_id <= cast(:through as bigint)
       ) + count(*) filter (
           where hold.state in ('released', 'retrying')
             and (hold.event_ids <> '{}' or hold.next_attempt_at is not null)
       ) as coming,
       count(*) filter (where hold.state = 'dead') as dead
from {schema}.outbox_hold as hold
where hold.backend_id = :backend_id and hold.oldest_id <= cast(:through as bigint)
""")

Tell = Callable[[str], None]

_ROUNDS = 5
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.02, 0.5
_TELL_EVERY = 5.0
_REASON = "the secondary was removed"
_WHY = "a secondary is filled"


class Addition(msgspec.Struct, frozen=True):
    """What came of adding a secondary: its status now, the last comparison, and how many of its keys are dead."""

    backend_id: str
    status: str
    proof: ReconciliationResult
    dead: int = 0

    @property
    def equal(self) -> bool:
        """Whether it was shown to equal the primary; only then was it promoted."""
        return self.proof.in_sync and not self.dead


class Roster(Prover):
    """Adds, promotes, drains and removes secondaries. Each step can be told again after it was cut off."""

    def _relay_of(self, registrations: Sequence[Registration]) -> Relay:
        """Return a relay for some secondaries only."""
        raise NotImplementedError

    async def add(self, backend_id: str, *, tell: Tell = lambda _: None) -> Addition:
        """Bring a secondary of this manager to equal the primary while writes go on, then make it live.

        Registers it as a shadow, waits for the writers that do not know it yet, backfills, waits until it has what it
        is owed, and reconciles until nothing differs; promotes it if nothing does. Carries to it by itself, so no
        relay need know it yet; relays that do help. Cut off and called again, it goes on where it was. A secondary that
        is live already is filled and compared all the same. `tell` is given sentences about what goes on.

        Raises `UnknownSecondary` for one that this manager does not have, or that is paused, and `SettingsError` when
        no class is tracked, because then there is nothing to fill it from.
        """
        registration = self._registration(backend_id)
        if not list(self.tracking):
            raise SettingsError("tracking", "add needs a tracked class to fill from; without one, fill and promote it")
        await self._join(registration, tell)
        proof, dead = await self._fill(registration, tell)
        if proof.in_sync and not dead:
            await self.promote(backend_id)
            tell(f"{backend_id} equals the primary and is live")
        status = (await self._standing(backend_id)).status
        return Addition(backend_id, status, proof, dead)

    async def promote(self, backend_id: str) -> None:
        """Make a shadow live: from now on it may be read, is waited for, and counts for health.

        Proves nothing; `add` does. Raises `UnknownSecondary` for one that is neither a shadow nor live.
        """
        await self._stand(PROMOTE, backend_id, "a shadow or live")

    async def drain(self, backend_id: str) -> None:
        """Owe a secondary nothing more; what it is owed by now is carried as before.

        Returns once no transaction is left that may still record something for it. Raises `UnknownSecondary` for one
        that is not there or removed.
        """
        await self._stand(DRAIN, backend_id, "there and not removed")
        await settled(self.engine, self.config.database_schema)
        self.ring()

    async def drained(self, backend_id: str, *, tell: Tell = lambda _: None) -> int:
        """Wait until a secondary has all that it is owed by now; return how many keys are dead and stay away."""
        through = await self._scalar(HIGHEST)
        sleep, tell_at = _SHORTEST_SLEEP, time.monotonic() + _TELL_EVERY
        while True:
            asked = time.monotonic()
            left = await self._owed(backend_id, through)
            if not left.coming:
                return int(left.dead)
            if time.monotonic() >= tell_at:
                tell(f"{left.coming:,} deliveries to {backend_id} to go")
                tell_at = time.monotonic() + _TELL_EVERY
            # It counts all that is owed: what costs more is asked less often.
            await asyncio.sleep(max(sleep, 10 * (time.monotonic() - asked)))
            sleep = min(sleep * 2, _LONGEST_SLEEP)

    async def remove(
        self, backend_id: str, *, discard: bool = False, reason: str = _REASON, dry_run: bool = False
    ) -> Removal:
        """Take a secondary out of the registry's care; return what it was owed and will not get.

        Refuses while anything is owed to it, unless told to `discard` that: then it is noted as given up, with the
        `reason`, and whoever has it in hand settles nothing. `dry_run` only tells. Relays stop carrying at their next
        poll. Its row stays, as `removed`; registered again, it comes back as a shadow without its backfill.

        Raises `StillOwed`, and `UnknownSecondary` for one that is not there.
        """
        found = await self._standing(backend_id)
        if dry_run:
            return Removal(backend_id, found.in_flight, 0, found.pending - found.in_flight)
        if not discard:
            await self._refuse_owed(found)
            if found.status != "removed":
                await self.drain(backend_id)
            # Whoever recorded for it until a moment ago has committed by now.
            await self._refuse_owed(await self._standing(backend_id))
        await self._stand(REMOVE, backend_id, "there")
        await settled(self.engine, self.config.database_schema)
        # What a backfill that was under way has written since.
        await self._execute(FORGET_BACKFILL, backend_id)
        return await retire(self.engine, self.config.database_schema, backend_id, reason)

    async def _refuse_owed(self, found: BackendSyncStatus) -> None:
        if found.pending:
            raise StillOwed(found.backend_id, found.pending, found.dead)

    async def _join(self, registration: Registration, tell: Tell) -> None:
        """Let every new event be owed to it, and wait until that is true of all that is recorded."""
        backend_id, schema = registration.backend_id, self.config.database_schema
        async with self.engine.begin() as connection:
            await connection.execute(text(REJOIN.on(schema)), {"backend_id": backend_id})
            await connection.run_sync(register, schema, [replace(registration, shadow=True)])
        found = await self._standing(backend_id)
        if found.status == "paused":
            raise UnknownSecondary(backend_id, "it is paused; resume it, then add it")
        tell(f"{backend_id} is registered and {found.status}: new events are owed to it")
        await settled(
            self.engine,
            schema,
            lambda pids: tell(f"waiting for transactions that began before that, of processes {pids or 'prepared'}"),
        )

    async def _fill(self, registration: Registration, tell: Tell) -> tuple[ReconciliationResult, int]:
        """Backfill and reconcile until nothing differs; return the last comparison and how many keys are dead."""
        backend_id = registration.backend_id
        async with self._carrying(registration):
            tell(f"filling {backend_id}; what was filled before is not filled again")
            await self.backfill(backend_id, progress=_seldom(tell))
            for _ in range(_ROUNDS):
                await self.drained(backend_id, tell=tell)
                proof = await self.reconcile(backend_id, repair=True, actor="outbox add", reason=_WHY)
                tell(f"compared {proof.primary_count:,} resources: {_differences(proof)} differ")
                if proof.in_sync or not proof.repaired:
                    break
            # A comparison leaves out what is in flight: how that ends is part of the answer.
            return proof, await self.drained(backend_id, tell=tell)

    @asynccontextmanager
    async def _carrying(self, registration: Registration) -> AsyncIterator[None]:
        """Carry to one secondary for as long as the block lasts; a relay that fails ends the block."""
        relay = self._relay_of([registration])
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(relay.run())
                try:
                    yield
                finally:
                    relay.stop()
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _registration(self, backend_id: str) -> Registration:
        for each in self.registrations:
            if each.backend_id == backend_id:
                return each
        raise UnknownSecondary(backend_id, "this manager does not have it")

    async def _standing(self, backend_id: str) -> BackendSyncStatus:
        for each in await statuses(self.engine, self.config):
            if each.backend_id == backend_id:
                return each
        raise UnknownSecondary(backend_id, "the registry does not have it")

    async def _stand(self, statement: Statement, backend_id: str, expected: str) -> None:
        if not await self._execute(statement, backend_id):
            raise UnknownSecondary(backend_id, f"the registry has no such secondary that is {expected}")

    async def _execute(self, statement: Statement, backend_id: str) -> bool:
        """Run a statement in a transaction of its own; whether it changed anything."""
        async with self.engine.begin() as connection:
            sql = text(statement.on(self.config.database_schema))
            return bool((await connection.execute(sql, {"backend_id": backend_id})).rowcount)

    async def _scalar(self, statement: Statement) -> int:
        async with self.engine.connect() as connection:
            return int(await connection.scalar(text(statement.on(self.config.database_schema))) or 0)

    async def _owed(self, backend_id: str, through: int) -> Any:
        async with self.engine.connect() as connection:
            sql = text(OWED_THROUGH.on(self.config.database_schema))
            return (await connection.execute(sql, {"backend_id": backend_id, "through": through})).one()


def _differences(proof: ReconciliationResult) -> str:
    return f"{proof.missing + proof.extra + proof.stale + proof.altered:,}"


def _seldom(tell: Tell) -> Callable[[BackfillProgress], None]:
    """Tell how far a backfill is, now and then."""
    tell_at = time.monotonic() + _TELL_EVERY

    def told(progress: BackfillProgress) -> None:
        nonlocal tell_at
        if progress.finished or time.monotonic() >= tell_at:
            waiting = f"; waits for {progress.waiting}" if progress.waiting else ""
            tell(f"{progress.recorded:,} of {progress.total:,} resources recorded for {progress.backend_id}{waiting}")
            tell_at = time.monotonic() + _TELL_EVERY

    return told
