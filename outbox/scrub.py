"""Scrub: take the content out of what is kept of one resource, and leave positions and order as they are.

What nobody is owed any more keeps its operation and holds `{}`, so what was done stays true. What somebody is still
owed becomes a delete: nothing of it that was not sent yet can be sent any more, and no secondary is given an empty
object to refuse. Attempts hold positions and codes only, and are left as they are.
"""

from __future__ import annotations

from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from outbox.find import Asked
from outbox.statement import Statement

__all__ = ["COUNTED", "EVENTS", "FAILURES", "NOTES", "Scrubbed", "count_scrubbable", "scrub", "scrub_failures"]

# mine  its events before the delete that hold anything
# owed  which of them somebody is still owed: waiting, in hand or held, all in one snapshot
EVENTS = Statement("""
with mine as materialized (
    select event.event_id, cast(hashtextextended(event.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0) as key_hash
    from {schema}.outbox as event
    where event.tenant_id = :tenant_id and event.resource_type = :resource_type and event.resource_id = :resource_id
      and event.event_id < cast(:position as bigint)
      and (event.headers is not null or cast(event.content as text) <> '{}')
), owed as materialized (
    select mine.event_id
    from mine cross join {schema}.outbox_secondary as secondary
    cross join lateral (
        select from {schema}.outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = mine.lane
          and delivery.event_id = mine.event_id
        offset 0
    ) as delivery
    union
    select unnest(attempt.event_ids) from {schema}.outbox_attempt as attempt where attempt.finished_at is null
    union
    select mine.event_id
    from mine cross join {schema}.outbox_secondary as secondary
    cross join lateral (
        select from {schema}.outbox_hold as hold
        where hold.backend_id = secondary.backend_id and hold.key_hash = mine.key_hash
          and mine.event_id = any (hold.event_ids)
        offset 0
    ) as hold
), scrubbed as (
    update {schema}.outbox as event
    set operation = case when event.event_id in (select event_id from owed) then 'delete' else event.operation end,
        content = case when event.operation <> 'delete' and event.event_id not in (select event_id from owed)
                       then cast('{}' as json) end,
        headers = null
    where event.event_id = any (array(select event_id from mine))
    returning event.event_id
)
select count(*) from scrubbed
""")

# What failed is due again at once: the delete behind it must not wait for an operator. What an attempt has in hand is
# left to it.
FAILURES = Statement(
    """
with scrubbed as (
    update {schema}.outbox_hold as hold
    set error = null,
        state = case when [again] then 'released' else hold.state end,
        attempts = case when [again] then 0 else hold.attempts end,
        lost = case when [again] then 0 else hold.lost end,
        first_failed_at = case when [again] then null else hold.first_failed_at end,
        next_attempt_at = case when [again] then statement_timestamp() else hold.next_attempt_at end
    where hold.backend_id = any (array(select backend_id from {schema}.outbox_secondary))
      and hold.key_hash = hashtextextended(
          cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
      )
      and hold.tenant_id = :tenant_id and hold.resource_type = :resource_type and hold.resource_id = :resource_id
      and hold.page = 0 and (hold.error is not null or [again])
    returning hold.backend_id
)
select count(*) from scrubbed
""".replace("[again]", "hold.state = 'dead' or hold.state = 'retrying' and hold.next_attempt_at is not null")
)

NOTES = Statement("""
with scrubbed as (
    update {schema}.outbox_discarded as discarded
    set reason = 'forgotten'
    where discarded.backend_id = any (array(select backend_id from {schema}.outbox_secondary))
      and discarded.key_hash = hashtextextended(
          cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
      )
      and discarded.tenant_id = :tenant_id and discarded.resource_type = :resource_type
      and discarded.resource_id = :resource_id and discarded.reason <> 'forgotten'
    returning discarded.backend_id
)
select count(*) from scrubbed
""")

COUNTED = Statement("""
select count(*) from {schema}.outbox as event
where event.tenant_id = :tenant_id and event.resource_type = :resource_type and event.resource_id = :resource_id
  and (event.headers is not null or cast(event.content as text) <> '{}')
""")


class Scrubbed(msgspec.Struct, frozen=True):
    """How much was scrubbed: events, failures with their errors, notes of what was given up with their reasons."""

    events: int = 0
    failures: int = 0
    notes: int = 0


async def scrub(connection: AsyncConnection, schema: str, asked: Asked, position: int) -> Scrubbed:
    """Scrub events below `position`, failures and notes, in the connection's transaction."""
    below = asked.parameters | {"position": position}
    return Scrubbed(
        await _count(connection, EVENTS, schema, below),
        await scrub_failures(connection, schema, asked),
        await _count(connection, NOTES, schema, asked.parameters),
    )


async def scrub_failures(connection: AsyncConnection, schema: str, asked: Asked) -> int:
    """Take the errors out of the resource's failures and make them due at once; return how many there were."""
    return await _count(connection, FAILURES, schema, asked.parameters)


async def count_scrubbable(connection: AsyncConnection, schema: str, asked: Asked) -> int:
    """Return how many events hold anything that would be scrubbed; changes nothing."""
    return await _count(connection, COUNTED, schema, asked.parameters)


async def _count(connection: AsyncConnection, statement: Statement, schema: str, parameters: dict[str, Any]) -> int:
    return int((await connection.execute(text(statement.on(schema)), parameters)).scalar_one())
