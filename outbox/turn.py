"""Turn: one claim per secondary at a time, and what the registry says to whoever's turn it is."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import msgspec

from outbox.errors import OutboxError
from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["ALL_TURNS", "LOOKED", "SET_BACK", "TURN", "Turn", "say_looked", "set_back", "take_turn"]

# The registry row is taken in a statement of its own: the claim's snapshot, taken after, then shows every
# earlier claim of this secondary. SKIP LOCKED, because whoever holds the row is claiming already.
TURN = Statement("""
select secondary.status, secondary.ordering, secondary.breaker, secondary.breaker_failures, secondary.breaker_ramp,
       cast(coalesce(extract(epoch from secondary.breaker_until - statement_timestamp()), 0) as double precision)
           as breaker_wait,
       secondary.folded_through,
       exists (
           select from {schema}.outbox_attempt as attempt
           where attempt.backend_id = :backend_id and attempt.attempt_id > secondary.folded_through
             and attempt.finished_at is null and attempt.lease_until < statement_timestamp()
       ) as lost_attempts,
       exists (
           select from {schema}.outbox_attempt as attempt
           where attempt.backend_id = :backend_id and attempt.attempt_id > secondary.folded_through
             and attempt.finished_at is null
       ) as open_attempts,
       exists (
           select from {schema}.outbox_hold as hold where hold.backend_id = :backend_id
       ) as holds,
       -- Ordered, so that only the index of what is due can serve it.
       coalesce((
           select true from {schema}.outbox_hold as hold
           where hold.backend_id = :backend_id and hold.alone and hold.next_attempt_at <= statement_timestamp()
           order by hold.next_attempt_at
           limit 1
       ), false) as suspects,
       greatest(secondary.looked_at - statement_timestamp(), interval '0') as ahead,
       secondary.beyond is not null as beyond
from {schema}.outbox_secondary as secondary
where secondary.backend_id = :backend_id
for no key update of secondary skip locked
""")

# Whoever puts an event behind a hold has the turn: whoever touches holds beside the claims, of one secondary or of all,
# waits for it, and meanwhile claims pass by.
ALL_TURNS = Statement("""
select from {schema}.outbox_secondary as secondary
where cast(:backend_id as text) is null or secondary.backend_id = :backend_id
order by secondary.backend_id
for no key update of secondary
""")

# Of several relays one is enough. A time that is still to come is of a clock that was wrong.
LOOKED = Statement("""
update {schema}.outbox_secondary
set looked_at = statement_timestamp()
where backend_id = :backend_id
  and (looked_at is null
       or looked_at not between statement_timestamp() - cast(:every as interval) / 2 and statement_timestamp())
""")

# What was to come by the old time comes as much earlier, and so did what happened by it. A lease is of the old time if
# it had not run out when a relay last looked; what was renewed since ends before that. A doubt is never set before a
# comparison whose time stays as it is: that one may have come first.
SET_BACK = Statement("""
with waiting as materialized (
    select hold.row_id
    from unnest(array[false, true]) as kind (alone)
    cross join lateral (
        select hold.ctid as row_id from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id and hold.alone = kind.alone
          and hold.next_attempt_at > statement_timestamp()
        order by hold.next_attempt_at
        offset 0
    ) as hold
), held as (
    update {schema}.outbox_hold
    set next_attempt_at = next_attempt_at - cast(:ahead as interval)
    where ctid = any (array(select row_id from waiting))
), leased as (
    update {schema}.outbox_attempt
    set lease_until = lease_until - cast(:ahead as interval)
    where backend_id = :backend_id and attempt_id > :folded_through and finished_at is null
      and lease_until > statement_timestamp() + cast(:ahead as interval)
), compared as (
    update {schema}.outbox_reconciliation
    set started_at = case when started_at > statement_timestamp() then started_at - cast(:ahead as interval)
                          else started_at end,
        finished_at = finished_at - cast(:ahead as interval)
    where backend_id = :backend_id and finished_at > statement_timestamp()
)
update {schema}.outbox_secondary as secondary
set looked_at = statement_timestamp(), breaker_until = breaker_until - cast(:ahead as interval),
    proof_at = case when proof_at > statement_timestamp() then proof_at - cast(:ahead as interval)
                    else proof_at end,
    doubted_at = case when doubted_at > statement_timestamp() then greatest(doubted_at - cast(:ahead as interval), (
                          select max(run.started_at) from {schema}.outbox_reconciliation as run
                          where run.backend_id = secondary.backend_id and run.tenant_id is null
                            and run.resource_type is null and run.started_at <= statement_timestamp()
                      ))
                      else doubted_at end,
    registered_at = case when registered_at > statement_timestamp() then registered_at - cast(:ahead as interval)
                         else registered_at end
where secondary.backend_id = :backend_id
""")


class Turn(msgspec.Struct, frozen=True):
    """What the registry says of a secondary to the one relay whose turn it is to claim."""

    status: str
    ordering: str
    breaker: str
    breaker_failures: int
    breaker_ramp: int | None
    breaker_wait: float
    folded_through: int
    lost_attempts: bool
    open_attempts: bool
    holds: bool
    suspects: bool
    ahead: timedelta
    beyond: bool

    @property
    def log_order(self) -> bool:
        """Whether every event counts, and not only the newest of a key."""
        return self.ordering == "log"

    @property
    def at_rest(self) -> bool:
        """Whether nothing is held and nothing in hand: only a new position brings work."""
        return self.breaker == "closed" and not (self.holds or self.open_attempts)

    def check_opened(self, attempt_ids: Sequence[int]) -> None:
        """Raise `OutboxError` for an attempt that nobody would see, as its number was counted before: open none."""
        if attempt_ids and min(attempt_ids) <= self.folded_through:
            raise OutboxError(
                f"attempt {min(attempt_ids)} was opened when all up to {self.folded_through} had been counted: the "
                "sequence of attempts was set back; `outbox doctor` says how to mend it"
            )


async def take_turn(connection: asyncpg.Connection[Any], schema: str, backend_id: str) -> Turn | None:
    """Lock the secondary's registry row until the transaction ends; None when another relay has it."""
    row = await connection.fetchrow(*TURN.arguments(schema, {"backend_id": backend_id}))
    return None if row is None else Turn(*row)


async def say_looked(connection: asyncpg.Connection[Any], schema: str, backend_id: str, every: timedelta) -> None:
    """Write that this secondary is being looked after; it counts if whoever has the turn comes to its end."""
    await connection.execute(*LOOKED.arguments(schema, {"backend_id": backend_id, "every": every}))


async def set_back(connection: asyncpg.Connection[Any], schema: str, backend_id: str, turn: Turn) -> None:
    """Bring what was scheduled and leased to the primary's new time: its clock was set back by `turn.ahead`."""
    parameters = {"backend_id": backend_id, "folded_through": turn.folded_through, "ahead": turn.ahead}
    await connection.execute(*SET_BACK.arguments(schema, parameters))
