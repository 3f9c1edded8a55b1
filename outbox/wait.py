"""Wait: ask the primary what became of events; the answer is never truer than one snapshot of its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.answer import SyncState
from outbox.primary import code_of
from outbox.statement import Statement

__all__ = ["FATE", "HISTORY", "STATE", "Asked", "Found", "fate", "history", "look"]

Asked = tuple[str, int, int]
"""A secondary, a position, and the stamp of the transaction that drew it."""

# A delivery is either waiting, in hand or held, and moves between them in one transaction: what is in none of the
# three, and whose event is there, is done. An event with another stamp is somebody else's, to whom a crash gave the
# position again. A hold stands for its key from `oldest_id` on.
STATE = Statement("""
with in_hand as materialized (
    select attempt.backend_id, unnest(attempt.event_ids) as event_id
    from {schema}.outbox_attempt as attempt
    where attempt.finished_at is null and attempt.backend_id = any (cast(:backend_ids as text[]))
)
select asked.*, event.event_id is not null as known, event.stamp = asked.stamp as its_own,
       delivery.event_id is not null as waiting,
       (asked.backend_id, asked.event_id) in (select backend_id, event_id from in_hand) as in_hand,
       hold.state as hold, coalesce(hold.attempts, discarded.attempts, 0) as attempts,
       coalesce(hold.error_code, discarded.error_code) as error_code,
       discarded.event_id is not null as discarded, secondary.status
from unnest(cast(:backend_ids as text[]), cast(:event_ids as bigint[]), cast(:stamps as bigint[]))
    as asked (backend_id, event_id, stamp)
left join {schema}.outbox_secondary as secondary on secondary.backend_id = asked.backend_id
left join lateral (
    select event.event_id, event.stamp, event.tenant_id, event.resource_type, event.resource_id,
           cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from {schema}.outbox as event where event.event_id = asked.event_id offset 0
) as event on true
left join lateral (
    select delivery.event_id from {schema}.outbox_delivery as delivery
    where delivery.backend_id = asked.backend_id and delivery.lane = event.lane
      and delivery.event_id = asked.event_id
    offset 0
) as delivery on true
left join lateral (
    select hold.state, hold.attempts, hold.error_code from {schema}.outbox_hold as hold
    where hold.backend_id = asked.backend_id and hold.key_hash = event.key_hash and hold.tenant_id = event.tenant_id
      and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id
      and hold.page = 0 and hold.oldest_id <= asked.event_id
    offset 0
) as hold on true
left join lateral (
    select discarded.event_id, discarded.attempts, discarded.error_code
    from {schema}.outbox_discarded as discarded
    where discarded.backend_id = asked.backend_id and discarded.key_hash = event.key_hash
      and asked.event_id between discarded.oldest_id and discarded.event_id
    limit 1
) as discarded on true
""")

# The latest attempts that had these events in hand, hand-backs left out: how many they were, and whether in the last of
# them a newer event of the key went in their stead.
HISTORY = Statement("""
with recent as materialized (
    select attempt.backend_id, attempt.attempt_id, owed.event_id,
           secondary.ordering = 'state'
               and max(owed.event_id) over (partition by attempt.attempt_id, owed.key_hash) > owed.event_id as passed
    from {schema}.outbox_secondary as secondary
    cross join lateral (
        select * from {schema}.outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id
        order by attempt.attempt_id desc
        limit 100
    ) as attempt
    cross join lateral unnest(attempt.event_ids, attempt.key_hashes) as owed (event_id, key_hash)
    where secondary.backend_id = any (cast(:names as text[])) and attempt.released < cardinality(attempt.event_ids)
      and exists (
          select from unnest(attempt.event_ids) as owed (event_id)
          where owed.event_id = any (cast(:event_ids as bigint[]))
      )
)
select asked.*, count(*) as attempts,
       (array_agg(recent.passed order by recent.attempt_id desc))[1] as superseded
from unnest(cast(:backend_ids as text[]), cast(:event_ids as bigint[]), cast(:stamps as bigint[]))
    as asked (backend_id, event_id, stamp)
join recent on recent.backend_id = asked.backend_id and recent.event_id = asked.event_id
group by asked.backend_id, asked.event_id, asked.stamp
""")

FATE = Statement("select pg_xact_status(cast(cast(:transaction_id as text) as xid8))")

_FATES = {"in progress": SyncState.UNCOMMITTED, "aborted": SyncState.ROLLED_BACK, "committed": SyncState.PRUNED}
_IN_THE_FUTURE = "22023"


class Found(msgspec.Struct, frozen=True):
    """What one look said of one event on one secondary; UNKNOWN when the event is not there."""

    state: SyncState
    attempts: int | None = None
    error_code: str | None = None


async def look(connection: AsyncConnection, schema: str, asked: Sequence[Asked]) -> dict[Asked, Found]:
    """Return what is known of each event on each secondary, all in one snapshot."""
    rows = await _rows(connection, STATE, schema, _arrays(asked))
    return {(row.backend_id, row.event_id, row.stamp): _found(row) for row in rows}


async def history(connection: AsyncConnection, schema: str, asked: Sequence[Asked]) -> dict[Asked, Found]:
    """Return how often events that are done were handed over; those whose attempts lie too far back are left out."""
    names = sorted({backend_id for backend_id, _, _ in asked})
    rows = await _rows(connection, HISTORY, schema, {"names": names, **_arrays(asked)})
    return {
        (row.backend_id, row.event_id, row.stamp): Found(
            SyncState.SUPERSEDED if row.superseded else SyncState.APPLIED, int(row.attempts)
        )
        for row in rows
    }


async def fate(connection: AsyncConnection, schema: str, transaction_id: int) -> SyncState:
    """Return what a transaction means for an event of it that a **later** look does not find.

    `connection` is in autocommit: inside a transaction the later look could be on an older snapshot.
    """
    try:
        rows = await _rows(connection, FATE, schema, {"transaction_id": str(transaction_id)})
    except DBAPIError as error:
        if code_of(error.orig) != _IN_THE_FUTURE:
            raise
        # The token is another database's.
        return SyncState.UNKNOWN
    return _FATES.get(rows[0][0], SyncState.UNKNOWN)


def _found(row: Any) -> Found:
    if not row.its_own:
        return Found(SyncState.ROLLED_BACK if row.known else SyncState.UNKNOWN)
    if not (row.waiting or row.in_hand or row.hold):
        given_up = SyncState.REMOVED if row.status == "removed" else SyncState.DISCARDED
        return Found(given_up if row.discarded else SyncState.APPLIED, row.attempts or None, row.error_code)
    if row.hold == "dead" and not row.waiting:
        return Found(SyncState.DEAD, row.attempts, row.error_code)
    if row.status not in ("live", "shadow", "draining"):
        return Found(SyncState.PAUSED if row.status == "paused" else SyncState.REMOVED, row.attempts, row.error_code)
    if row.hold == "retrying" and not row.waiting:
        return Found(SyncState.FAILING, row.attempts, row.error_code)
    return Found(SyncState.ACCEPTED, row.attempts or None, row.error_code)


def _arrays(asked: Iterable[Asked]) -> dict[str, Any]:
    backend_ids, event_ids, stamps = zip(*asked, strict=True)
    return {"backend_ids": list(backend_ids), "event_ids": list(event_ids), "stamps": list(stamps)}


async def _rows(connection: AsyncConnection, statement: Statement, schema: str, parameters: dict[str, Any]) -> Any:
    return (await connection.execute(text(statement.on(schema)), parameters)).all()
