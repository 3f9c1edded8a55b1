"""Claim: take fresh deliveries for one secondary and turn each batch of them into one open attempt."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import COLUMNS, POSITION, Attempt
from outbox.lanes import Asked, Lanes
from outbox.statement import Statement
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["CLAIM", "CLAIM_FEW", "FEW", "claim", "claim_few"]

# busy      keys in some open attempt: nobody may start another event of them
# held      whether any key is held back
# fresh     deliveries of keys neither busy nor held, from each lane in turn, from its floor, in position order
# sliced    cut into batches; the rank of equal hashes is equal, so that a key never falls into two of them
# opened    each whole batch as one row
_OPENED = """
with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through and attempt.finished_at is null
), held as materialized (
    select exists (select from {schema}.outbox_hold as hold where hold.backend_id = :backend_id) as any_hold
), fresh as materialized (
    select delivery.row_id, delivery.lane, delivery.event_id, delivery.key_hash
    from unnest(cast(:lanes as smallint[]), cast(:floors as bigint[]), cast(:shares as integer[]))
        as lane (lane, floor, share)
    cross join lateral (
        select delivery.ctid as row_id, delivery.lane, delivery.event_id, delivery.key_hash
        from {schema}.outbox_delivery as delivery
        where delivery.backend_id = :backend_id and delivery.lane = lane.lane and delivery.event_id > lane.floor
          and delivery.key_hash not in (select key_hash from busy)
          -- Asked once, as nearly always there is no hold at all; else a probe per row, as the plan of a join would
          -- hang on how many holds there once were.
          and (not (select any_hold from held) or not exists (
              select from {schema}.outbox_hold as hold
              where hold.backend_id = :backend_id and hold.key_hash = delivery.key_hash
              offset 0
          ))
        order by delivery.event_id
        limit lane.share
        for update of delivery skip locked
    ) as delivery
    limit cast(:batch_size as integer) * cast(:slots as integer)
), gone as (
    delete from {schema}.outbox_delivery where ctid = any (array(select row_id from fresh))
), sliced as (
    select event_id, key_hash, (rank() over (order by key_hash) - 1) / cast(:batch_size as integer) as slice
    from fresh
), opened as (
    insert into {schema}.outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until)
    select :backend_id, cast(:relay_id as uuid), array_agg(event_id), array_agg(key_hash),
           clock_timestamp() + cast(:lease as interval)
    from sliced
    group by slice
    returning attempt_id
)
select [answer]
"""

CLAIM = Statement(
    _OPENED.replace(
        "[answer]",
        """array(select attempt_id from opened) as attempt_ids,
       array_agg(taken.lane) as lanes, array_agg(taken.deliveries) as deliveries
from (select lane, count(*) as deliveries from fresh group by lane) as taken""",
    )
)

# A few are one attempt, and come with their contents: of one event's way to its secondary a round trip is a tenth.
CLAIM_FEW = Statement(
    _OPENED.replace(
        "[answer]",
        """(select attempt_id from opened) as attempt_id, fresh.lane, [columns]
from fresh left join lateral (
    select * from {schema}.outbox as event where event.event_id = fresh.event_id offset 0
) as event on true""",
    )
    .replace("[columns]", COLUMNS)
    .replace("[share]", "cast(:batch_bytes as bigint) / (select count(*) from fresh)")
)

#: How many events come with their contents at once.
FEW = 10


async def claim(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    turn: Turn,
    batch_size: int,
    lanes: Lanes,
    lease: timedelta,
    slots: int = 1,
) -> list[int]:
    """Open up to `slots` attempts of up to `batch_size` keys each; return their ids.

    There are none when nothing is waiting but held keys. Runs in the transaction of `take_turn`. Several attempts from
    one claim share its fixed cost; what is in them is loaded once the claim is committed.
    """
    most = batch_size * slots
    asked = lanes.shares(most)
    parameters = _parameters(backend_id, relay_id, turn, asked, lease) | {"batch_size": batch_size, "slots": slots}
    [(attempt_ids, lanes_taken, deliveries)] = await connection.fetch(*CLAIM.arguments(schema, parameters))
    turn.check_opened(attempt_ids)
    taken = list(zip(lanes_taken or (), deliveries or (), strict=True))
    lanes.learn(asked, taken, full=sum(deliveries or ()) >= most)
    return sorted(attempt_ids)


async def claim_few(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    turn: Turn,
    batch_size: int,
    batch_bytes: int,
    lanes: Lanes,
    lease: timedelta,
) -> list[tuple[int, Attempt | None]]:
    """Open one attempt of up to `batch_size` keys; return its id and, if all of its events are there, the attempt.

    As `claim` otherwise; nothing is to be dispatched before the claim is committed.
    """
    asked = lanes.shares(batch_size)
    bounds = {"batch_size": batch_size, "slots": 1, "batch_bytes": batch_bytes}
    parameters = _parameters(backend_id, relay_id, turn, asked, lease) | bounds
    found = await connection.fetch(*CLAIM_FEW.arguments(schema, parameters))
    lanes.learn(asked, Counter(row[1] for row in found).items(), full=len(found) >= batch_size)
    if not found:
        return []
    attempt_id, rows = found[0][0], [row[2:] for row in found]
    turn.check_opened([attempt_id])
    if any(row[POSITION] is None for row in rows):
        # Somebody deleted an event by hand; loading knows what to do.
        return [(attempt_id, None)]
    return [(attempt_id, Attempt.of_rows(attempt_id, backend_id, log_order=turn.log_order, rows=rows))]


def _parameters(backend_id: str, relay_id: UUID, turn: Turn, asked: Asked, lease: timedelta) -> dict[str, Any]:
    return {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "folded_through": turn.folded_through,
        "lease": lease,
        "lanes": asked.lanes,
        "floors": asked.floors,
        "shares": asked.shares,
    }
