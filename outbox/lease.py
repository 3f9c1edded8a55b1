"""Lease: keep an attempt while its secondary works, and find the attempts that outlived theirs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import OWED, Attempt
from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["EXPIRED", "HEARTBEAT", "expired", "heartbeat"]

# The range says nothing new, but PostgreSQL 15 looks for a list among all that is open, and for a range where it lies.
HEARTBEAT = Statement("""
update {schema}.outbox_attempt as attempt
set lease_until = clock_timestamp() + cast(:lease as interval)
where attempt.backend_id = :backend_id and attempt.attempt_id = any (cast(:attempt_ids as bigint[]))
  and attempt.attempt_id between cast(:lowest as bigint) and cast(:highest as bigint)
  and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
returning attempt.attempt_id
""")

# The columns are those of a claim, without content: nobody is going to dispatch from here.
EXPIRED = Statement(
    """
select attempt.attempt_id,
       hold.attempts, hold.lost,
       statement_timestamp() - hold.first_failed_at as failing_for, hold.oldest_id,
       event.tenant_id, event.resource_type, event.resource_id, event.operation, null as content, event.version,
       event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       null as left_out
[owed]
where attempt.backend_id = :backend_id and attempt.attempt_id > :folded_through
  and attempt.finished_at is null and attempt.lease_until < statement_timestamp()
order by attempt.attempt_id, event.event_id
""".replace("[owed]", OWED)
)


async def heartbeat(
    connection: asyncpg.Connection[Any],
    schema: str,
    relay_id: UUID,
    backend_id: str,
    attempt_ids: Sequence[int],
    lease: timedelta,
) -> set[int]:
    """Renew the leases of attempts at one secondary; return the ids of those that are still this relay's."""
    if not attempt_ids:
        return set()
    parameters = {"lease": lease, "backend_id": backend_id, "attempt_ids": attempt_ids, "relay_id": relay_id}
    parameters |= {"lowest": min(attempt_ids), "highest": max(attempt_ids)}
    rows = await connection.fetch(*HEARTBEAT.arguments(schema, parameters))
    return {row[0] for row in rows}


async def expired(
    connection: asyncpg.Connection[Any], schema: str, backend_id: str, folded_through: int, *, log_order: bool
) -> list[Attempt]:
    """Return the open attempts whose lease ran out, whoever held them."""
    parameters = {"backend_id": backend_id, "folded_through": folded_through}
    rows = await connection.fetch(*EXPIRED.arguments(schema, parameters))
    return [
        Attempt.of_held(attempt_id, backend_id, log_order=log_order, rows=[row[1:] for row in group])
        for attempt_id, group in groupby(rows, key=lambda row: row[0])
    ]
