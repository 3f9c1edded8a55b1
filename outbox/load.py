"""Load: fetch the events of an attempt that was just opened.

Apart from the claim, so that the secondary's turn is over sooner and the next claim runs while contents travel. A
content above its share of the batch's bytes is left out, and fetched when its part of the batch is about to go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import COLUMNS, OWED, Attempt
from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["CONTENTS", "LOAD", "LOAD_HELD", "contents", "load"]

# One walk through one index, at less than half the price of a join. Shares and not a running sum: they need no order,
# and together they cannot exceed the batch's bytes either.
LOAD = Statement(
    """
with mine as materialized (
    select attempt.event_ids, cast(:batch_bytes as bigint) / cardinality(attempt.event_ids) as share
    from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
      and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
)
select [columns]
from {schema}.outbox as event
where event.event_id = any (cast((select event_ids from mine) as bigint[]))
""".replace("[columns]", COLUMNS).replace("[share]", "(select share from mine)")
)

# What holds remember of their keys too: until the attempt is settled, only they know that a key was held. An attempt
# that is ours has a row here even when somebody deleted its events.
LOAD_HELD = Statement(
    """
select hold.attempts, hold.lost, statement_timestamp() - hold.first_failed_at as failing_for, hold.oldest_id,
       [columns]
[owed]
where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
  and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
""".replace("[owed]", OWED)
    .replace("[columns]", COLUMNS)
    .replace("[share]", "cast(:batch_bytes as bigint) / cardinality(attempt.event_ids)")
)

# Behind the same fence: whoever lost the attempt has nothing more to send.
CONTENTS = Statement("""
select event.event_id, cast(event.content as text) as content
from {schema}.outbox as event
where event.event_id = any (cast(:event_ids as bigint[])) and exists (
    select from {schema}.outbox_attempt as attempt
    where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id
      and attempt.relay_id = cast(:relay_id as uuid) and attempt.finished_at is null
)
""")


async def load(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    attempt_id: int,
    log_order: bool,
    held: bool,
    batch_bytes: int,
) -> Attempt | None:
    """Return the attempt with its events; None when it is no longer this relay's.

    `held` asks for what holds remember of its keys: it may be False only for an attempt that no hold was taken into.
    """
    parameters = {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "attempt_id": attempt_id,
        "batch_bytes": batch_bytes,
    }
    rows = [] if held else await connection.fetch(*LOAD.arguments(schema, parameters))
    if rows:
        return Attempt.of_rows(attempt_id, backend_id, log_order=log_order, rows=rows)
    rows = await connection.fetch(*LOAD_HELD.arguments(schema, parameters))
    return Attempt.of_held(attempt_id, backend_id, log_order=log_order, rows=rows) if rows else None


async def contents(
    connection: asyncpg.Connection[Any],
    schema: str,
    *,
    backend_id: str,
    relay_id: UUID,
    attempt_id: int,
    positions: Sequence[int],
) -> dict[int, str]:
    """Return contents that were left out, by position; none of them when the attempt is no longer this relay's."""
    parameters = {
        "backend_id": backend_id,
        "relay_id": relay_id,
        "attempt_id": attempt_id,
        "event_ids": positions,
    }
    return dict(await connection.fetch(*CONTENTS.arguments(schema, parameters)))
