"""Breaker: stop asking a secondary that is not there, let one probe at a time decide, then ramp up.

Its state lives in the registry, so all relays share it and a restart forgets nothing. The healthy path never writes it.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import Attempt
from outbox.settings import SyncConfig
from outbox.statement import Statement
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["EASE", "PROBE", "TRIP", "allowance", "ease", "probe", "trip"]

# Whoever finds the secondary unavailable counts, but an open breaker does not open wider by batches that left before.
# Only while the attempt is his: so it can go before the settle, and nobody finds a half-open breaker with nothing open.
TRIP = Statement("""
update {schema}.outbox_secondary as secondary
set breaker = case when opens then 'open' else secondary.breaker end,
    breaker_failures = secondary.breaker_failures + 1,
    breaker_opens = secondary.breaker_opens + cast(opens as integer),
    breaker_ramp = case when opens then null else secondary.breaker_ramp end,
    breaker_until = case
        when opens then statement_timestamp() + greatest(
            cast(:asked as interval),
            least(cast(:longest as interval), cast(:first as interval) * power(2, least(secondary.breaker_opens, 30)))
                * (0.5 + random() / 2))
        else secondary.breaker_until end
from (
    select backend_id,
           breaker = 'half_open' or breaker = 'closed'
               and (breaker_failures + 1 >= :threshold or cast(:asked as interval) > interval '0') as opens
    from {schema}.outbox_secondary
    where backend_id = :backend_id and exists (
        select from {schema}.outbox_attempt as attempt
        where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
          and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
    )
    for update
) as found
where secondary.backend_id = found.backend_id
""")

EASE = Statement("""
update {schema}.outbox_secondary as secondary
set breaker = 'closed', breaker_failures = 0, breaker_opens = 0, breaker_until = null,
    breaker_ramp = case
        when secondary.breaker <> 'closed' then 2
        when secondary.breaker_ramp * 2 < :batch_size then secondary.breaker_ramp * 2 end
where secondary.backend_id = :backend_id
""")

PROBE = Statement("""
update {schema}.outbox_secondary
set breaker = 'half_open', breaker_until = statement_timestamp() + cast(:lease as interval)
where backend_id = :backend_id
""")


def allowance(turn: Turn, batch_size: int) -> int:
    """Return how many events may be claimed: none while open, one as a probe, a growing number after."""
    if turn.breaker == "half_open":
        return 0 if turn.open_attempts else 1
    if turn.breaker == "open":
        return 0 if turn.breaker_wait > 0 else 1
    return batch_size if turn.breaker_ramp is None else min(batch_size, turn.breaker_ramp)


async def probe(connection: asyncpg.Connection[Any], schema: str, backend_id: str, lease: timedelta) -> None:
    """Announce a probe; should its relay die, the next may probe when its lease is over."""
    await connection.execute(*PROBE.arguments(schema, {"backend_id": backend_id, "lease": lease}))


async def trip(
    connection: asyncpg.Connection[Any],
    schema: str,
    attempt: Attempt,
    relay_id: UUID,
    config: SyncConfig,
    retry_after: timedelta | None = None,
) -> None:
    """Count a batch that found the secondary unavailable; open the breaker at the threshold or after a failed probe.

    Before the attempt is settled: else the next probe could begin in between. Changes nothing once it is no longer
    ours. The wait doubles from probe to probe with equal jitter, and is never shorter than what the secondary asked
    for.
    """
    parameters = {
        "backend_id": attempt.backend_id,
        "attempt_id": attempt.attempt_id,
        "relay_id": relay_id,
        "threshold": config.breaker_threshold,
        "first": config.breaker_initial,
        "longest": config.breaker_max,
        "asked": min(retry_after or timedelta(0), config.retry_max),
    }
    await connection.execute(*TRIP.arguments(schema, parameters))


async def ease(connection: asyncpg.Connection[Any], schema: str, backend_id: str, batch_size: int) -> None:
    """Close the breaker after a batch got through, or double the ramp until batches are full again."""
    await connection.execute(*EASE.arguments(schema, {"backend_id": backend_id, "batch_size": batch_size}))
