"""Prune: fold what is finished into the totals, and forget what every secondary has."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from outbox.statement import Statement
from outbox.turn import take_turn

if TYPE_CHECKING:
    import asyncpg

__all__ = [
    "FOLD",
    "MEND",
    "PRUNE_ATTEMPTS",
    "PRUNE_DISCARDED",
    "PRUNE_EVENTS",
    "PRUNE_RECONCILIATIONS",
    "Walked",
    "fold",
    "prune_attempts",
    "prune_discarded",
    "prune_events",
    "prune_reconciliations",
]

# Attempts are created under the registry row's lock, which the folder holds: none can appear below an open one. A step
# at a time: what one attempt that stayed open for hours kept from being folded would be too much for one statement.
FOLD = Statement("""
with reach as materialized (
    select least(
        coalesce((
            select attempt.attempt_id - 1 from {schema}.outbox_attempt as attempt
            where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through
              and attempt.finished_at is null
            order by attempt.attempt_id
            limit 1
        ), (
            select attempt.attempt_id from {schema}.outbox_attempt as attempt
            where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through
            order by attempt.attempt_id desc
            limit 1
        )), (
            select attempt.attempt_id from {schema}.outbox_attempt as attempt
            where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through
            order by attempt.attempt_id
            offset :most - 1 limit 1
        )
    ) as attempt_id
), total as (
    select sum(attempt.applied) as applied, sum(attempt.stale) as stale, sum(attempt.superseded) as superseded,
           sum(attempt.retried) as retried, sum(attempt.rejected) as rejected, sum(attempt.released) as released,
           sum(attempt.lost) as lost,
           max(attempt.finished_at) filter (where attempt.applied + attempt.stale > 0) as last_success_at,
           max(attempt.finished_at) filter (where attempt.error_code is not null) as last_error_at,
           (array_agg(attempt.error_code order by attempt.finished_at desc)
               filter (where attempt.error_code is not null))[1] as last_error_code
    from {schema}.outbox_attempt as attempt cross join reach
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through
      and attempt.attempt_id <= reach.attempt_id
)
update {schema}.outbox_secondary as secondary
set folded_through = reach.attempt_id,
    applied = secondary.applied + total.applied, stale = secondary.stale + total.stale,
    superseded = secondary.superseded + total.superseded, retried = secondary.retried + total.retried,
    rejected = secondary.rejected + total.rejected, released = secondary.released + total.released,
    lost = secondary.lost + total.lost,
    last_success_at = greatest(secondary.last_success_at, total.last_success_at),
    last_error_at = greatest(secondary.last_error_at, total.last_error_at),
    last_error_code = coalesce(total.last_error_code, secondary.last_error_code)
from reach cross join total
where secondary.backend_id = :backend_id and reach.attempt_id > :folded_through and total.applied is not null
""")

# A hold in hand that no open attempt has would stay so for ever; only a hand can have made one. What it owes is due.
# A page that lies behind nothing any more becomes a hold.
MEND = Statement("""
with busy as materialized (
    select unnest(attempt.key_hashes) as key_hash
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through and attempt.finished_at is null
), stray as materialized (
    select hold.ctid as row_id, hold.event_ids = '{}' and not exists (
               select from {schema}.outbox_hold as behind
               where behind.backend_id = :backend_id and behind.key_hash = hold.key_hash
                 and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
                 and behind.resource_id = hold.resource_id and behind.page > 0
               offset 0
           ) as owes_nothing
    from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id and hold.next_attempt_at is null and hold.state <> 'dead'
      and hold.key_hash not in (select key_hash from busy)
      and (hold.page = 0 or not exists (
          select from {schema}.outbox_hold as before
          where before.backend_id = :backend_id and before.key_hash = hold.key_hash
            and before.tenant_id = hold.tenant_id and before.resource_type = hold.resource_type
            and before.resource_id = hold.resource_id and before.page < hold.page
          offset 0
      ))
), gone as (
    delete from {schema}.outbox_hold where ctid = any (array(select row_id from stray where owes_nothing))
)
update {schema}.outbox_hold
set next_attempt_at = statement_timestamp(), page = 0, state = case when page > 0 then 'released' else state end
where ctid = any (array(select row_id from stray where not owes_nothing))
""")

# One snapshot decides: a delivery is either waiting, in hand or held, and moves between them in one transaction.
# The oldest come first, and one that is young ends the walk: to look for what is old among all that is kept would take
# ever longer. What is further from now than `keep` in either direction is of a clock that was wrong,
# and keeps nobody.
PRUNE_EVENTS = Statement("""
with head as materialized (
    select event.event_id, event.tenant_id, event.resource_type, event.resource_id,
           event.created_at not between statement_timestamp() - cast(:keep as interval)
               and statement_timestamp() + cast(:keep as interval) as old
    from {schema}.outbox as event
    where event.event_id > :after
    order by event.event_id
    limit :page_size
), page as materialized (
    select event_id, cast(hashtextextended(tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0) as key_hash
    from head
    where old
), secondary as materialized (
    select backend_id, folded_through from {schema}.outbox_secondary
), owed as materialized (
    select page.event_id
    from page cross join secondary
    cross join lateral (
        select from {schema}.outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = page.lane
          and delivery.event_id = page.event_id
        offset 0
    ) as delivery
    union all
    select attempt.event_id
    from secondary
    cross join lateral (
        select unnest(attempt.event_ids) as event_id
        from {schema}.outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
          and attempt.finished_at is null
    ) as attempt
    union all
    -- By key and not by event, and of a long line only the pages that are about these.
    select hold.event_id
    from (
        select key_hash, min(event_id) as first_id, max(event_id) as last_id from page group by key_hash
    ) as key cross join secondary
    cross join lateral (
        select unnest(hold.event_ids) as event_id
        from {schema}.outbox_hold as hold
        where hold.backend_id = secondary.backend_id and hold.key_hash = key.key_hash
          and hold.oldest_id <= key.last_id and hold.event_ids[cardinality(hold.event_ids)] >= key.first_id
        offset 0
    ) as hold
), gone as (
    delete from {schema}.outbox where event_id = any (
        array(select event_id from page where event_id not in (select event_id from owed))
    )
)
select coalesce(min(event_id) filter (where not old) - 1, max(event_id)) as through,
       coalesce(bool_and(old), false) and count(*) = :page_size as more
from head
""")

# A note of what was given up is of use as long as somebody may ask about an event that it stands for: the newest may be
# forgotten first, when an older one is still owed to another secondary. Any key's event in between keeps it, because to
# find one is a step, and to find that none is the key's would be a walk.
PRUNE_DISCARDED = Statement("""
with page as materialized (
    select discarded.ctid as row_id, discarded.discarded_at, discarded.oldest_id, discarded.event_id
    from {schema}.outbox_discarded as discarded
    where discarded.discarded_at > coalesce(cast(:after as timestamptz), timestamptz '-infinity')
      and discarded.discarded_at < statement_timestamp() - cast(:keep as interval)
    order by discarded.discarded_at
    -- What was given up at once is looked at together, since the next page begins after its time.
    fetch first (:page_size) rows with ties
), gone as (
    delete from {schema}.outbox_discarded where ctid = any (array(
        select page.row_id from page where not exists (
            select from {schema}.outbox as event
            where event.event_id between page.oldest_id and page.event_id
            offset 0
        )
    ))
)
select case when count(*) >= :page_size then max(discarded_at) end from page
""")

# In the order of their claims, which is nearly that of their ends.
PRUNE_ATTEMPTS = Statement("""
with head as materialized (
    select secondary.backend_id, attempt.row_id, attempt.attempt_id,
           attempt.finished_at not between statement_timestamp() - cast(:keep as interval)
               and statement_timestamp() + cast(:keep as interval) as old
    from {schema}.outbox_secondary as secondary
    cross join lateral (
        select attempt.ctid as row_id, attempt.attempt_id, attempt.finished_at
        from {schema}.outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.attempt_id <= secondary.folded_through
          and attempt.attempt_id > coalesce((
              select walked.through
              from unnest(cast(:backend_ids as text[]), cast(:throughs as bigint[])) as walked (backend_id, through)
              where walked.backend_id = secondary.backend_id
          ), 0)
        order by attempt.attempt_id
        limit :page_size
    ) as attempt
), gone as (
    delete from {schema}.outbox_attempt where ctid = any (array(select row_id from head where old))
)
select backend_id, coalesce(min(attempt_id) filter (where not old) - 1, max(attempt_id)) as through,
       bool_and(old) and count(*) = :page_size as more
from head
group by backend_id
""")

# What repaired something is kept for good, and so is the latest proof of each secondary.
PRUNE_RECONCILIATIONS = Statement("""
delete from {schema}.outbox_reconciliation as old
where old.finished_at < statement_timestamp() - cast(:keep as interval) and old.repaired = 0
  and (old.tenant_id is not null or old.resource_type is not null or exists (
      select from {schema}.outbox_reconciliation as newer
      where newer.backend_id = old.backend_id and newer.tenant_id is null and newer.resource_type is null
        and newer.finished_at > old.finished_at
  ))
""")

_PAGE = 1_000
_MOST_FOLDED = 20_000


class Walked(msgspec.Struct, frozen=True):
    """How far a walk has come: everything up to `through` was looked at and is old; `more` may be there beyond."""

    through: int
    more: bool


async def fold(connection: asyncpg.Connection[Any], schema: str, backend_id: str) -> None:
    """Add the closed attempts below the oldest open one to the secondary's totals; does nothing if it is busy."""
    async with connection.transaction():
        turn = await take_turn(connection, schema, backend_id)
        if turn is not None:
            parameters = {"backend_id": backend_id, "folded_through": turn.folded_through, "most": _MOST_FOLDED}
            await connection.execute(*MEND.arguments(schema, parameters))
            await connection.execute(*FOLD.arguments(schema, parameters))


async def prune_discarded(
    connection: asyncpg.Connection[Any], schema: str, keep: timedelta, after: datetime | None = None
) -> datetime | None:
    """Of the next page of notes given after `after` delete those that are older than `keep` and stand for no event.

    Return the last time looked at, to go on from, or None when there was less than a page.
    """
    parameters = {"keep": keep, "after": after, "page_size": _PAGE}
    last: datetime | None = await connection.fetchval(*PRUNE_DISCARDED.arguments(schema, parameters))
    return last


async def prune_reconciliations(connection: asyncpg.Connection[Any], schema: str, keep: timedelta) -> None:
    """Delete notes of comparisons that repaired nothing, are older than `keep`, and have a newer one."""
    await connection.execute(*PRUNE_RECONCILIATIONS.arguments(schema, {"keep": keep}))


async def prune_events(connection: asyncpg.Connection[Any], schema: str, keep: timedelta, after: int) -> Walked:
    """Of the next page of events above `after` delete those that are older than `keep` and owed to nobody."""
    parameters = {"after": after, "keep": keep, "page_size": _PAGE}
    row = await connection.fetchrow(*PRUNE_EVENTS.arguments(schema, parameters))
    assert row is not None, "an aggregate has a row"
    return Walked(after if row["through"] is None else row["through"], row["more"])


async def prune_attempts(
    connection: asyncpg.Connection[Any], schema: str, keep: timedelta, throughs: Mapping[str, int]
) -> dict[str, Walked]:
    """Delete, of a page per secondary above its `throughs`, attempts folded and closed for longer than `keep`."""
    parameters = {
        "keep": keep,
        "backend_ids": list(throughs),
        "throughs": list(throughs.values()),
        "page_size": _PAGE,
    }
    rows = await connection.fetch(*PRUNE_ATTEMPTS.arguments(schema, parameters))
    return {row["backend_id"]: Walked(row["through"], row["more"]) for row in rows}
