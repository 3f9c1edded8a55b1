"""Load: fetch the events of an attempt that was just opened.

Apart from the claim, so that the secondary's turn is over sooner and the next claim runs while contents travel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import OWED, Attempt
from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["LOAD", "LOAD_HELD", "load"]

# One walk through one index, at less than half the price of a join.
LOAD = Statement("""
select event.tenant_id, event.resource_type, event.resource_id, event.operation,
       cast(event.content as text) as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at
from {schema}.outbox as event
where event.event_id = any (cast((
    select attempt.event_ids from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
      and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
) as bigint[]))
""")

# What holds remember of their keys too: until the attempt is settled, only they know that a key was held. An attempt
# that is ours has a row here even when somebody deleted its events.
LOAD_HELD = Statement(
    """
select hold.attempts, hold.lost, statement_timestamp() - hold.first_failed_at as failing_for, hold.oldest_id,
       event.tenant_id, event.resource_type, event.resource_id, event.operation,
       cast(event.content as text) as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at
[owed]
where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
  and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
""".replace("[owed]", OWED)
)


async def load(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    attempt_id: int,
    log_order: bool,
    held: bool,
) -> Attempt | None:
    """Return the attempt with its events; None when it is no longer this relay's.

    `held` asks for what holds remember of its keys: it may be False only for an attempt that no hold was taken into.
    """
    parameters = {"backend_id": backend_id, "relay_id": relay_id, "attempt_id": attempt_id}
    rows = [] if held else await connection.fetch(*LOAD.arguments(schema, parameters))
    if rows:
        return Attempt.of_rows(attempt_id, backend_id, log_order=log_order, rows=rows)
    rows = await connection.fetch(*LOAD_HELD.arguments(schema, parameters))
    return Attempt.of_held(attempt_id, backend_id, log_order=log_order, rows=rows) if rows else None
