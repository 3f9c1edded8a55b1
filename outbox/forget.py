"""Forget: erase one resource at every secondary and from what is kept of it, and say what was seen to be gone.

The primary's row is the application's to delete, before. One transaction records a delete that is owed to every
secondary, whether it wants the resource or not, and takes the content out of its events: either both happen or
neither. Then the delete is waited for, and every secondary is asked whether the resource is really absent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession

from outbox.answer import SyncState, SyncStatus
from outbox.capture import Tracking
from outbox.errors import NotForgotten
from outbox.event import SyncEvent
from outbox.find import Asked
from outbox.record import record
from outbox.repair import ALONE
from outbox.scrub import Scrubbed, count_scrubbable, scrub, scrub_failures
from outbox.secondaries.base import Secondary
from outbox.source import Source
from outbox.statement import Statement
from outbox.token import HIGHEST_POSITION, SyncToken
from outbox.why import CLOCK, found_at
from outbox.writers import writers_ended

__all__ = ["NEWEST", "OWE", "REGISTERED", "Erased", "Eraser", "Evidence"]

REGISTERED = Statement("""
select secondary.backend_id, secondary.status from {schema}.outbox_secondary as secondary order by secondary.backend_id
""")

# Where no class is tracked, the newest event that is kept is all there is to tell by.
NEWEST = Statement("""
select event.operation from {schema}.outbox as event
where event.tenant_id = :tenant_id and event.resource_type = :resource_type and event.resource_id = :resource_id
  and event.event_id < cast(:below as bigint)
order by event.event_id desc
limit 1
""")

# A secondary that does not want the resource any more may still hold it.
OWE = Statement("""
insert into {schema}.outbox_delivery (backend_id, lane, event_id, key_hash)
select secondary.backend_id, cast(hashtextextended(cast(:tenant_id as text), 0) & 63 as smallint),
       cast(:position as bigint),
       hashtextextended(
           cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
       )
from {schema}.outbox_secondary as secondary
where secondary.status in ('shadow', 'live', 'paused')
on conflict (backend_id, lane, event_id) do nothing
""")

_CARRIED = ("shadow", "live", "paused")
_ROUNDS = 3

# Waits until what a token names is done at every secondary it is owed to, or nothing helps, or for so long.
_Wait = Callable[[SyncToken, timedelta], Awaitable[Sequence[SyncStatus]]]


class Erased(msgspec.Struct, frozen=True):
    """What was seen at one secondary. `absent` is None where it could not be asked; `why` says what is not proved.

    `delete` says what became of the delete it was owed, None where it was owed none.
    """

    backend_id: str
    status: str | None
    delete: SyncState | None
    absent: bool | None
    verified_at: datetime | None
    why: str | None


class Evidence(msgspec.Struct, frozen=True):
    """That one resource was erased: what was scrubbed, and where it was seen to be absent. Never content.

    `position` is the delete's, None for a dry run. `unproved` has a sentence for everything that could not be verified.
    """

    tenant_id: str
    resource_type: str
    resource_id: str
    reason: str | None
    dry_run: bool
    position: int | None
    at: datetime
    scrubbed: Scrubbed
    secondaries: tuple[Erased, ...]
    unproved: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was done and seen to be done."""
        return not self.dry_run and not self.unproved


class Eraser:
    """Erases resources, on the primary behind `engine` and at the `secondaries` of this process, by name."""

    def __init__(
        self,
        engine: AsyncEngine,
        schema: str,
        tracking: Tracking,
        secondaries: Mapping[str, Secondary],
        wait: _Wait,
        timeout: timedelta,
    ) -> None:
        self._engine = engine
        self._schema = schema
        self._source = Source(self._engine, tracking)
        self._secondaries = secondaries
        self._wait = wait
        self._timeout = timeout

    async def preview(self, asked: Asked, reason: str | None) -> Evidence:
        """Return what `forget` would find, having changed nothing. Raises `NotForgotten` where it would."""
        async with AsyncSession(self._engine) as session:
            await self._refuse_present(session, asked, HIGHEST_POSITION)
            events = await count_scrubbable(await session.connection(), self._schema, asked)
        seen = await self._seen(asked, None, {})
        return await self._evidence(asked, reason, None, Scrubbed(events), seen)

    async def forget(self, asked: Asked, reason: str | None) -> Evidence:
        """Erase, wait, verify; a second call does no harm.

        Raises `NotForgotten`, with nothing changed, while the primary has the resource or somebody may still commit it.
        """
        token, position, scrubbed = await self._erase(asked, reason)
        statuses = await self._carried(asked, token)
        seen = await self._seen(asked, position, {each.backend_id: each.state for each in statuses})
        return await self._evidence(asked, reason, position, scrubbed, seen)

    async def _erase(self, asked: Asked, reason: str | None) -> tuple[SyncToken, int, Scrubbed]:
        async with AsyncSession(self._engine) as session, session.begin():
            # At any stricter level the look after the wait would be on the snapshot from before it.
            connection = await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            await self._refuse_present(session, asked, HIGHEST_POSITION)
            await connection.execute(text(ALONE.on(self._schema)))
            token = await record(connection, _delete(asked, reason), schema=self._schema)
            [position] = token.positions
            await connection.execute(text(OWE.on(self._schema)), asked.parameters | {"position": position})
            # Whoever drew a lower position and has not committed yet would be refused by every secondary.
            if not await writers_ended(connection, self._schema, time.monotonic() + self._timeout.total_seconds()):
                raise NotForgotten("a transaction that recorded something is still open, and could bring it back")
            await self._refuse_present(session, asked, position)
            scrubbed = await scrub(connection, self._schema, asked, position)
            owed = [name for name, status in (await self._registered(connection)).items() if status in _CARRIED]
        [written] = token.recorded
        return SyncToken.of(written.transaction_id, written.stamp, [(position, owed)]), position, scrubbed

    async def _refuse_present(self, session: AsyncSession, asked: Asked, below: int) -> None:
        primary = await self._source.in_primary(session, *asked)
        parameters = asked.parameters | {"below": below}
        newest = None if primary.tracked else await session.scalar(text(NEWEST.on(self._schema)), parameters)
        if primary.present or newest not in (None, "delete"):
            where = "the primary still has it" if primary.present else "its newest event is no delete"
            raise NotForgotten(f"{where}: delete it first, through a session that records the delete")

    async def _carried(self, asked: Asked, token: SyncToken) -> Sequence[SyncStatus]:
        """Wait for the delete; what failed meanwhile loses its error, which may quote what it was, and is due again."""
        deadline = time.monotonic() + self._timeout.total_seconds()
        for _ in range(_ROUNDS):
            left = timedelta(seconds=max(deadline - time.monotonic(), 0))
            statuses = await self._wait(token, left)
            async with self._engine.begin() as connection:
                await scrub_failures(connection, self._schema, asked)
            if not any(each.state is SyncState.DEAD for each in statuses):
                break
        return statuses

    async def _registered(self, connection: AsyncConnection) -> dict[str, str]:
        rows = await connection.execute(text(REGISTERED.on(self._schema)))
        return {row.backend_id: row.status for row in rows}

    async def _seen(self, asked: Asked, position: int | None, states: Mapping[str, SyncState]) -> list[Erased]:
        async with self._engine.connect() as connection:
            registered = await self._registered(connection)
        names = sorted({*registered, *self._secondaries})
        looks = (self._look(asked, name, registered.get(name), position, states.get(name)) for name in names)
        return list(await asyncio.gather(*looks))

    async def _look(
        self, asked: Asked, name: str, status: str | None, position: int | None, state: SyncState | None
    ) -> Erased:
        found = await found_at(self._secondaries.get(name), asked)
        if isinstance(found, str):
            return Erased(name, status, state, None, None, found)
        why = None
        if status in ("draining", "removed"):
            why = f"it is {status}, so no delete reaches it"
        elif state is not None and not state.done:
            why = f"the delete has not arrived ({state})"
        if found is not None:
            again = position is not None and found.position > position
            why = f"it was written again, at position {found.position}" if again else why or "it still holds it"
        return Erased(name, status, state, found is None, await self._clock(), why)

    async def _clock(self) -> datetime:
        async with self._engine.connect() as connection:
            at: datetime = (await connection.execute(text(CLOCK.on(self._schema)))).scalar_one()
            return at

    async def _evidence(
        self, asked: Asked, reason: str | None, position: int | None, scrubbed: Scrubbed, seen: Sequence[Erased]
    ) -> Evidence:
        unproved = [f"{each.backend_id}: {each.why}" for each in seen if each.why is not None]
        if asked.resource_type not in self._source.resource_types:
            unproved.insert(
                0, f"the primary: {asked.resource_type} is not tracked here, so nobody can say that it is gone"
            )
        dry_run = position is None
        return Evidence(*asked, reason, dry_run, position, await self._clock(), scrubbed, tuple(seen), tuple(unproved))


def _delete(asked: Asked, reason: str | None) -> SyncEvent:
    headers = None if reason is None else {"reason": reason}
    return SyncEvent.delete(asked.resource_type, asked.resource_id, tenant_id=asked.tenant_id, headers=headers)
