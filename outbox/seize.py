"""Seize: the claim of a caller who waits for its own events: the same lease, for the keys it names and no others."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.statement import Statement
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["SEIZE", "seize"]

# busy      keys in some open attempt: nobody may start another event of them
# asked     the events that are wanted, with where their deliveries would be
# mine      of their keys, up to where each is wanted
# ahead     what lies before them in their lanes, no further than a batch: what lies deeper comes when it is its turn
# fresh     what of that is of their keys, earlier events first, and none of a key that is held
# gone      what was really there to take
SEIZE = Statement("""
with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through and attempt.finished_at is null
), asked as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from unnest(cast(:event_ids as bigint[])) as wanted (event_id)
    cross join lateral (
        select * from {schema}.outbox as event where event.event_id = wanted.event_id offset 0
    ) as event
), mine as materialized (
    select asked.lane, asked.key_hash, max(asked.event_id) as last_id
    from asked
    cross join lateral (
        select from {schema}.outbox_delivery as delivery
        where delivery.backend_id = :backend_id and delivery.lane = asked.lane and delivery.event_id = asked.event_id
        offset 0
    ) as delivery
    group by asked.lane, asked.key_hash
), ahead as materialized (
    select lane.lane, delivery.row_id, delivery.event_id, delivery.key_hash
    from (select lane, max(last_id) as last_id from mine group by lane) as lane
    cross join lateral (
        select delivery.ctid as row_id, delivery.event_id, delivery.key_hash
        from {schema}.outbox_delivery as delivery
        where delivery.backend_id = :backend_id and delivery.lane = lane.lane and delivery.event_id <= lane.last_id
          and delivery.event_id > (cast(:floors as bigint[]))[lane.lane + 1]
        order by delivery.event_id
        limit cast(:batch_size as integer)
    ) as delivery
), fresh as materialized (
    select ahead.row_id
    from ahead join mine on mine.lane = ahead.lane and mine.key_hash = ahead.key_hash and mine.last_id >= ahead.event_id
    where ahead.key_hash not in (select key_hash from busy)
      and not exists (
          select from {schema}.outbox_hold as hold
          where hold.backend_id = :backend_id and hold.key_hash = ahead.key_hash
          offset 0
      )
    order by ahead.event_id
    limit cast(:batch_size as integer)
), gone as (
    delete from {schema}.outbox_delivery where ctid = any (array(select row_id from fresh))
    returning event_id, key_hash
), opened as (
    insert into {schema}.outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until)
    select :backend_id, cast(:relay_id as uuid), array_agg(event_id), array_agg(key_hash),
           clock_timestamp() + cast(:lease as interval)
    from gone
    having count(*) > 0
    returning attempt_id
)
select attempt_id from opened
""")


async def seize(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    turn: Turn,
    event_ids: Sequence[int],
    batch_size: int,
    floors: Sequence[int],
    lease: timedelta,
) -> int | None:
    """Open an attempt of these events and the earlier ones of their keys; return its id, None if none can be taken.

    Nothing can be when others have them in hand, when their keys are held, or when a batch or more lies before them in
    their lane. Runs in the transaction of `take_turn`.
    """
    parameters = {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "folded_through": turn.folded_through,
        "event_ids": event_ids,
        "batch_size": batch_size,
        "floors": floors,
        "lease": lease,
    }
    attempt_id: int | None = await connection.fetchval(*SEIZE.arguments(schema, parameters))
    turn.check_opened([] if attempt_id is None else [attempt_id])
    return attempt_id
