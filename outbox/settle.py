"""Settle: close the attempt and record every outcome, in one fenced statement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

import msgspec

from outbox.attempt import Attempt, Lost, Refused, Released, Result, Superseded
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Applied, Rejected, Retry, Stale
from outbox.statement import Statement
from outbox.verdict import OWED, Kept, Key, printable_code, verdicts

if TYPE_CHECKING:
    import asyncpg

__all__ = ["CLOSE", "SETTLE", "Settled", "settle"]

# Nearly every batch ends so: nothing failed and nothing was held, and one row says it all.
CLOSE = Statement("""
update {schema}.outbox_attempt as attempt
set finished_at = clock_timestamp(), applied = :applied, stale = :stale,
    superseded = attempt.superseded + cast(:superseded as integer)
where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id and attempt.finished_at is null
  and attempt.relay_id = cast(:relay_id as uuid)
returning attempt.attempt_id
""")

# closed    the fence: only the holder of the lease, or anybody once it ran out, and only once
# done      the holds of keys of which all that was in hand is done, and what is next of what lies in them or behind
# resolved  ... that owe nothing more
# eased     ... or, in log order, did not fit into the attempt: the rest is due at once
# held      keys that are held back from now on; what they still owed stays behind what failed
SETTLE = Statement("""
with closed as (
    update {schema}.outbox_attempt as attempt
    set finished_at = clock_timestamp(), applied = :applied, stale = :stale,
        superseded = attempt.superseded + cast(:superseded as integer), retried = :retried, rejected = :rejected,
        released = :released, lost = :lost, error_code = :error_code
    where attempt.backend_id = :backend_id and attempt.attempt_id = :attempt_id and attempt.finished_at is null
      and (attempt.relay_id = cast(:relay_id as uuid)
           or cast(:expired as boolean) and attempt.lease_until < statement_timestamp())
    returning attempt.attempt_id
), done as materialized (
    select hold.row_id, hold.next_id
    from closed cross join unnest(
        cast(:done_tenant_ids as text[]), cast(:done_resource_types as text[]), cast(:done_resource_ids as text[])
    ) as key (tenant_id, resource_type, resource_id)
    cross join lateral (
        select hold.ctid as row_id, coalesce(hold.event_ids[1], (
            select behind.oldest_id
            from {schema}.outbox_hold as behind
            where behind.backend_id = :backend_id and behind.key_hash = hold.key_hash
              and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
              and behind.resource_id = hold.resource_id and behind.page > 0
            order by behind.page
            limit 1
        )) as next_id
        from {schema}.outbox_hold as hold
        where hold.backend_id = :backend_id
          and hold.key_hash = hashtextextended(key.tenant_id || '/' || key.resource_type || '/' || key.resource_id, 0)
          and hold.tenant_id = key.tenant_id
          and hold.resource_type = key.resource_type and hold.resource_id = key.resource_id and hold.page = 0
        offset 0
    ) as hold
), resolved as (
    delete from {schema}.outbox_hold where ctid = any (array(select row_id from done where next_id is null))
), eased as (
    update {schema}.outbox_hold
    set state = 'released', attempts = 0, lost = 0, alone = false, next_attempt_at = statement_timestamp(),
        oldest_id = (select next_id from done where row_id = outbox_hold.ctid)
    where ctid = any (array(select row_id from done where next_id is not null))
), held as (
    insert into {schema}.outbox_hold as hold
        (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id, owed_since, state, attempts,
         lost, alone, first_failed_at, last_failed_at, next_attempt_at, error_code, error)
    select :backend_id, kept.tenant_id, kept.resource_type, kept.resource_id,
           hashtextextended(kept.tenant_id || '/' || kept.resource_type || '/' || kept.resource_id, 0),
           cast(kept.event_ids as bigint[]), kept.oldest_id, kept.owed_since, kept.state, kept.attempts, kept.lost,
           kept.alone,
           case when kept.anew then statement_timestamp() end,
           case when kept.error_code is not null then statement_timestamp() end,
           statement_timestamp() + make_interval(secs => kept.delay), kept.error_code, kept.error
    from closed cross join unnest(
        cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:resource_ids as text[]),
        cast(:event_ids as text[]), cast(:oldest_ids as bigint[]), cast(:owed_since as timestamptz[]),
        cast(:states as text[]),
        cast(:attempts as integer[]), cast(:losts as integer[]), cast(:alone as boolean[]), cast(:anew as boolean[]),
        cast(:delays as double precision[]), cast(:error_codes as text[]), cast(:errors as text[])
    ) as kept (tenant_id, resource_type, resource_id, event_ids, oldest_id, owed_since, state, attempts, lost, alone,
               anew, delay, error_code, error)
    on conflict (backend_id, key_hash, tenant_id, resource_type, resource_id, page) do update
    set event_ids = excluded.event_ids || hold.event_ids, oldest_id = excluded.oldest_id,
        owed_since = excluded.owed_since, state = excluded.state, attempts = excluded.attempts, lost = excluded.lost,
        alone = excluded.alone, next_attempt_at = excluded.next_attempt_at,
        first_failed_at = coalesce(excluded.first_failed_at, case when excluded.state <> 'released'
                                                                  then hold.first_failed_at end),
        last_failed_at = coalesce(excluded.last_failed_at, hold.last_failed_at),
        error_code = coalesce(excluded.error_code, hold.error_code),
        error = coalesce(excluded.error, hold.error)
)
select attempt_id from closed
""")


class Settled(msgspec.Struct, frozen=True):
    """What a settle that counted left behind: how many keys are dead now, and the code that most of them have."""

    dead: int = 0
    error_code: str | None = None


async def settle(
    connection: asyncpg.Connection[Any],
    schema: str,
    relay_id: UUID,
    attempt: Attempt,
    results: Sequence[Result],
    policy: RetryPolicy,
    *,
    error_code: str | None = None,
    expired: bool = False,
) -> Settled | None:
    """Close `attempt` with one result per event; return None, having changed nothing, if the lease is not ours.

    Autocommits. Any relay may close an `expired` attempt once its lease ran out, otherwise only its holder.
    """
    counted = Counter(map(type, results))
    expired = expired or Lost in counted
    parameters: dict[str, Any] = {
        "backend_id": attempt.backend_id,
        "attempt_id": attempt.attempt_id,
        "relay_id": relay_id,
        **_counts(counted),
    }
    if not expired and not attempt.held and not any(kind in counted for kind in OWED):
        return Settled() if await connection.fetchval(*CLOSE.arguments(schema, parameters)) is not None else None
    kept, done = verdicts(attempt, results, policy)
    parameters |= {
        "expired": expired,
        "error_code": printable_code(error_code) or next((each.error_code for each in kept if each.error_code), None),
        **_done_parameters(done),
        **_kept_parameters(kept),
    }
    closed = await connection.fetchval(*SETTLE.arguments(schema, parameters)) is not None
    return _left_by(kept) if closed else None


def _left_by(kept: list[Kept]) -> Settled:
    codes = Counter(each.error_code for each in kept if each.state == "dead")
    return Settled(codes.total(), codes.most_common(1)[0][0]) if codes else Settled()


def _counts(found: Counter[type[Result]]) -> dict[str, int]:
    return {
        "applied": found[Applied],
        "stale": found[Stale],
        "superseded": found[Superseded],
        "retried": found[Retry],
        "rejected": found[Rejected],
        "released": found[Released] + found[Refused],
        "lost": found[Lost],
    }


def _done_parameters(done: list[Key]) -> dict[str, Any]:
    return {
        "done_tenant_ids": [key[0] for key in done],
        "done_resource_types": [key[1] for key in done],
        "done_resource_ids": [key[2] for key in done],
    }


def _kept_parameters(kept: list[Kept]) -> dict[str, Any]:
    return {
        "tenant_ids": [each.key[0] for each in kept],
        "resource_types": [each.key[1] for each in kept],
        "resource_ids": [each.key[2] for each in kept],
        # Arrays of unequal length cannot be unnested side by side; their literals can.
        "event_ids": ["{" + ",".join(map(str, each.event_ids)) + "}" for each in kept],
        "oldest_ids": [each.oldest_id for each in kept],
        "owed_since": [each.owed_since for each in kept],
        "states": [each.state for each in kept],
        "attempts": [each.attempts for each in kept],
        "losts": [each.lost for each in kept],
        "alone": [each.alone for each in kept],
        "anew": [each.anew for each in kept],
        "delays": [each.delay for each in kept],
        "error_codes": [each.error_code for each in kept],
        "errors": [each.error for each in kept],
    }
