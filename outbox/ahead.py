"""Ahead: a secondary that holds what the primary has not given, because the primary's history went back.

It would refuse every new event as older than what it has until positions pass that, and all would count as done. So
whoever carries asks it first how far it is: at the start of a relay, and whenever the primary failed or may be another
one. If it is ahead, the registry says so, nothing is carried to it by anybody, and `move_past` is what ends that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from outbox.dispatch import highest_of
from outbox.epoch import DOUBT, doubt
from outbox.errors import SecondaryError, Unavailable
from outbox.lanes import HIGHEST
from outbox.level import begun
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.register import Registration
from outbox.secondaries.base import Positioned, Secondary
from outbox.settings import SyncConfig
from outbox.statement import Statement

__all__ = [
    "AGAIN",
    "CLEAR",
    "HELD_BACK",
    "LOCK",
    "MOVE",
    "PATIENCE",
    "Ahead",
    "Moved",
    "highest_positions",
    "move_past",
]

_log = logging.getLogger("outbox.relay")

# Half of all there are: whoever claims to be further is wrong about it, and positions cannot be moved back.
_FURTHEST = 2**62

PATIENCE = Statement("select set_config('lock_timeout', :patience, true)")

# Changes nothing. It waits for everybody who drew a position to end, and lets nobody draw one until the move is over:
# `setval` would else take back what somebody got in between.
LOCK = Statement("alter sequence {schema}.outbox_event_id_seq increment by 1")

HELD_BACK = Statement("select backend_id, beyond from {schema}.outbox_secondary where beyond is not null")

# What is owed to those that are ahead would be refused as old: room is left for it, above all that any of them holds
# and below whatever is written from now on.
MOVE = Statement("""
with given as materialized (
    select case when is_called then last_value else 0 end as highest from {schema}.outbox_event_id_seq
), reached as materialized (
    select greatest(
        cast(:seen as bigint),
        (select highest from given),
        (select max(event_id) from {schema}.outbox),
        (select max(event_id) from {schema}.outbox_delivery)
    ) as highest
), owed as materialized (
    select (select count(*) from {schema}.outbox_delivery where backend_id = any (cast(:ahead as text[])))
         + (select coalesce(sum(cardinality(event_ids)), 0) from {schema}.outbox_attempt
            where backend_id = any (cast(:ahead as text[])) and finished_at is null)
         + (select coalesce(sum(cardinality(event_ids)), 0) from {schema}.outbox_hold
            where backend_id = any (cast(:ahead as text[]))) as events
)
select reached.highest as through,
       case when reached.highest + owed.events > given.highest
            then setval('{schema}.outbox_event_id_seq', cast(reached.highest + owed.events as bigint))
            else given.highest end as after
from given cross join reached cross join owed
""")

# Whoever claims takes the row first: from here on to the commit nobody does. What was written since history went back
# may have been refused as old: only a comparison brings certainty.
CLEAR = Statement("""
update {schema}.outbox_secondary
set beyond = null, doubted_at = statement_timestamp()
where backend_id = any (cast(:ahead as text[]))
""")

# owed      what those that were ahead are owed, wherever it is
# numbered  its events, each with a position of its own in the room that was left for them
# written   the same events once more
# fetched   deliveries become holds, which stand for the old positions too: whoever waits for one waits for its copy
AGAIN = Statement("""
with owed as materialized (
    select backend_id, event_id from {schema}.outbox_delivery where backend_id = any (cast(:ahead as text[]))
    union
    select backend_id, unnest(event_ids) from {schema}.outbox_attempt
    where backend_id = any (cast(:ahead as text[])) and finished_at is null
    union
    select backend_id, unnest(event_ids) from {schema}.outbox_hold where backend_id = any (cast(:ahead as text[]))
), numbered as materialized (
    select event.event_id, cast(:through as bigint) + row_number() over (order by event.event_id) as position
    from {schema}.outbox as event
    where event.event_id in (select event_id from owed) and event.event_id <= cast(:through as bigint)
), written as (
    insert into {schema}.outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         created_at)
    overriding system value
    select numbered.position, event.tenant_id, event.resource_type, event.resource_id, event.operation, event.version,
           event.fhir_version, event.content, event.bulk_id, event.headers, event.created_at
    from numbered join {schema}.outbox as event on event.event_id = numbered.event_id
), fetched as (
    delete from {schema}.outbox_delivery
    where backend_id = any (cast(:ahead as text[])) and event_id in (select event_id from numbered)
), pulled as (
    delete from {schema}.outbox_hold where backend_id = any (cast(:ahead as text[])) and page > 0
), held as (
    insert into {schema}.outbox_hold as hold
        (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state,
         next_attempt_at)
    select owed.backend_id, event.tenant_id, event.resource_type, event.resource_id,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0),
           array_agg(numbered.position order by numbered.position), min(event.event_id), min(event.created_at),
           'released', statement_timestamp()
    from owed
    join numbered on numbered.event_id = owed.event_id
    join {schema}.outbox as event on event.event_id = owed.event_id
    group by owed.backend_id, event.tenant_id, event.resource_type, event.resource_id
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids
            || array(select later from unnest(hold.event_ids) as later where later > cast(:through as bigint)),
        oldest_id = least(hold.oldest_id, excluded.oldest_id), owed_since = least(hold.owed_since, excluded.owed_since)
)
select count(*) as events from numbered
""")


class Ahead:
    """Asks one secondary how far it is before a relay carries to it; again after `doubt`."""

    def __init__(self, secondary: Secondary, primary: Primary, config: SyncConfig) -> None:
        self._secondary = secondary
        self._primary = primary
        self._config = config
        self._asking = asyncio.Lock()
        self._doubts = 1
        self._answered = 0

    def doubt(self) -> None:
        """Ask again before the next batch: the primary failed, or may be another one."""
        self._doubts += 1

    async def check(self) -> None:
        """Return when nothing says that it is ahead; raise `Unavailable` when it is, or when it does not answer."""
        if self._answered == self._doubts or not isinstance(self._secondary, Positioned):
            return
        async with self._asking:
            if (doubts := self._doubts) == self._answered:
                return
            # Asked in this order: what is there by now was given before.
            held = await highest_of(self._secondary, self._config.attempt_deadline)
            given = await self._given(held)
            if held > given:
                raise Unavailable("ahead", f"it holds position {held}, and the primary has given {given}")
            self._answered = doubts

    async def _given(self, held: int) -> int:
        """Return the highest position that was given, once the registry says if that is too little."""
        schema, backend_id = self._config.database_schema, self._secondary.backend_id
        for failures in itertools.count(1):
            try:
                async with self._primary.connection() as connection:
                    given = int(await connection.fetchval(HIGHEST.on(schema)))
                    if held > given:
                        await doubt(connection, schema, backend_id, held)
            except PRIMARY_FAILED as error:
                _log.warning("%s: comparing positions failed (%s)", backend_id, code_of(error))
                await self._primary.recover(failures)
                continue
            if held > given:
                self._tell(held, given)
            return given
        raise AssertionError("counting never ends")

    def _tell(self, held: int, given: int) -> None:
        backend_id = self._secondary.backend_id
        _log.error(
            "%s: ahead of the primary: it holds position %d, the primary has given %d; nothing is carried to it before "
            "`outbox doctor --repair`",
            backend_id,
            held,
            given,
            extra={"outbox_backend_id": backend_id, "outbox_error_code": "ahead"},
        )


class Moved(msgspec.Struct, frozen=True):
    """What `move_past` did: the highest position given `before` and `after`, and how far each secondary was.

    `ahead` names those that were beyond what was given: until they are reconciled it is not known what they hold.
    `again` counts the events that they were owed, which were recorded again above all that they hold. Those in
    `unasked` cannot say how far they are, or did not answer; a relay asks the latter before it carries to them.
    """

    before: int
    after: int
    positions: dict[str, int]
    ahead: tuple[str, ...]
    unasked: tuple[str, ...]
    again: int = 0


async def highest_positions(registrations: Sequence[Registration], deadline: timedelta) -> dict[str, int | None]:
    """Return how far each secondary is, all asked at once; None for one that cannot say or did not."""
    answers = await asyncio.gather(*(_position_of(each.secondary, deadline) for each in registrations))
    return {each.backend_id: answer for each, answer in zip(registrations, answers, strict=True)}


async def move_past(engine: AsyncEngine, config: SyncConfig, registrations: Sequence[Registration]) -> Moved:
    """Let the next position be above all that any secondary holds; never lower it. Safe while writers write.

    They wait for it, for a moment: it is over at once, or fails after a second behind somebody who keeps a transaction
    open. What those that were ahead are owed is then recorded again, above what they hold and in its order, before
    anything is carried to them: they would refuse it as old, and it would count as done. Raises `SecondaryError` for
    what is too far to be true.
    """
    answers = await highest_positions(registrations, config.attempt_deadline)
    positions = {name: position for name, position in answers.items() if position is not None}
    schema = config.database_schema
    # Each statement sees what was committed before it, whatever level the engine has.
    async with begun(engine, "READ COMMITTED") as connection:
        before, ahead, moved = await _move(connection, schema, positions)
    again = 0
    if ahead:
        # Until this is committed they are withheld: cut off in between, it is for the next call to do.
        async with begun(engine, "READ COMMITTED") as connection:
            await connection.execute(text(CLEAR.on(schema)), {"ahead": ahead})
            terms = {"ahead": ahead, "through": moved.through}
            again = int((await connection.execute(text(AGAIN.on(schema)), terms)).scalar_one())
    unasked = tuple(sorted(answers.keys() - positions.keys()))
    return Moved(before, moved.after, positions, tuple(ahead), unasked, again)


async def _move(connection: AsyncConnection, schema: str, positions: dict[str, int]) -> tuple[int, list[str], Any]:
    """Move positions; return the highest given before, who is ahead and withheld now, and (through, after)."""
    await connection.execute(text(PATIENCE.on(schema)), {"patience": "1s"})
    await connection.execute(text(LOCK.on(schema)))
    before = int((await connection.execute(text(HIGHEST.on(schema)))).scalar_one())
    held_back = {each.backend_id: each.beyond for each in await connection.execute(text(HELD_BACK.on(schema)))}
    seen = max([0, *held_back.values(), *positions.values()])
    if seen > _FURTHEST:
        raise SecondaryError(f"a secondary says that it holds position {seen}: too far to be moved past")
    found = {name: position for name, position in positions.items() if position > before}
    for name, position in found.items():
        await connection.execute(text(DOUBT.on(schema)), {"backend_id": name, "position": position})
    ahead = sorted({*held_back, *found})
    moved = (await connection.execute(text(MOVE.on(schema)), {"seen": seen, "ahead": ahead})).one()
    return before, ahead, moved


async def _position_of(secondary: Secondary, deadline: timedelta) -> int | None:
    if not isinstance(secondary, Positioned):
        return None
    try:
        return await highest_of(secondary, deadline)
    except Unavailable:
        return None
