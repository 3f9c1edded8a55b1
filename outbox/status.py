"""Status: what is owed to whom, how old it is, and what is wrong. The one source for people, programs and pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.settings import SyncConfig
from outbox.statement import Statement

__all__ = [
    "FAILURES",
    "LAG",
    "BackendSyncStatus",
    "Checked",
    "Failure",
    "failures",
    "lag_text",
    "reasons_of",
    "statuses",
]

# The latest attempts are evidence of how a secondary does, and a hundred of them bound what it costs to look. Of each
# that was about anything: null when something got through, else its error.
LAG = Statement("""
select lag.backend_id, lag.status, lag.pending, lag.in_flight, lag.failing, lag.dead,
       coalesce(lag.lag, interval '0') as lag, lag.breaker, lag.last_success_at, lag.last_error_at, lag.last_error_code,
       lag.applied, lag.stale, lag.superseded, lag.retried, lag.rejected, lag.lost, lag.discarded,
       lag.looked_at, lag.silence,
       latest.throughput, lag.beyond,
       secondary.doubted_at is not null and (proof.started_at > secondary.doubted_at) is not true as doubted,
       latest.endings,
       proof.finished_at, proof.primary_count, proof.missing, proof.extra, proof.stale, proof.altered, proof.in_flight,
       proof.repaired
from {schema}.outbox_lag as lag
join {schema}.outbox_secondary as secondary on secondary.backend_id = lag.backend_id
cross join lateral (
    select cast(
               coalesce(sum(applied + stale + superseded) filter (where age < interval '1 minute'), 0)
               / case when count(*) < 100 or max(age) >= interval '1 minute' then 60
                      else greatest(extract(epoch from max(age)), 0.01) end
           as double precision) as throughput,
           coalesce(array_agg(
               case when applied + stale = 0 then coalesce(error_code, 'unknown') end order by attempt_id desc
           ) filter (
               where finished_at is not null
                 and (applied + stale + retried + rejected + lost > 0 or error_code is not null)
           ), '{}') as endings
    from (
        select attempt.*, statement_timestamp() - attempt.finished_at as age
        from {schema}.outbox_attempt as attempt
        where attempt.backend_id = lag.backend_id
        order by attempt.attempt_id desc
        limit 100
    ) as attempt
) as latest
left join lateral (
    select * from {schema}.outbox_reconciliation as proof
    where proof.backend_id = lag.backend_id and proof.tenant_id is null and proof.resource_type is null
    -- By their numbers: by a clock that was ahead, one that ended earlier would seem to be the latest.
    order by proof.run_id desc
    limit 1
) as proof on true
order by lag.backend_id
""")

FAILURES = Statement("""
select backend_id, tenant_id, resource_type, resource_id, state, attempts, error_code, error,
       first_failed_at, last_failed_at, next_attempt_at, cardinality(event_ids) + (
           select coalesce(sum(cardinality(behind.event_ids)), 0)
           from {schema}.outbox_hold as behind
           where behind.backend_id = hold.backend_id and behind.key_hash = hold.key_hash
             and behind.tenant_id = hold.tenant_id and behind.resource_type = hold.resource_type
             and behind.resource_id = hold.resource_id and behind.page > 0
       ) as owed
from {schema}.outbox_hold as hold
where state in ('retrying', 'dead') and (cast(:backend_id as text) is null or backend_id = :backend_id)
order by state, last_failed_at
limit :most
""")


class Checked(msgspec.Struct, frozen=True):
    """The latest comparison of all of a secondary with the primary: when it ended, how much it held, what it found.

    `repaired` counts the repair events it recorded; `in_flight` what was under way and left out.
    """

    at: datetime
    resources: int
    missing: int
    extra: int
    stale: int
    altered: int
    in_flight: int
    repaired: int

    @property
    def left(self) -> int:
        """How many resources differed, and were not repaired."""
        return max(0, self.missing + self.extra + self.stale + self.altered - self.repaired)


class BackendSyncStatus(msgspec.Struct, frozen=True):
    """One secondary, as the database knows it: the same from every process, right after a restart.

    `pending` counts every delivery still owed, those in flight, failing and dead included; `lag` is the age of the
    oldest of them by the database's clock, zero when nothing is owed. `failing` and `dead` count keys. The totals count
    deliveries since the secondary was registered, `throughput` those done per second in the last minute. `silence` is
    how long no relay has asked what is due. `beyond` is a position it holds that the primary has not given; nothing is
    carried to it then. `doubted`: the primary's history may have gone back since all of it was last compared. `reasons`
    say what makes it unhealthy, each beginning with what it is about: ahead, history, lag, pending, drift, dead,
    breaker, attempts or silence. Never content.
    """

    backend_id: str
    status: str
    pending: int
    in_flight: int
    failing: int
    dead: int
    lag: timedelta
    breaker: str
    last_success_at: datetime | None
    last_error_at: datetime | None
    last_error_code: str | None
    applied: int
    stale: int
    superseded: int
    retried: int
    rejected: int
    lost: int
    discarded: int
    looked_at: datetime | None
    silence: timedelta
    throughput: float
    beyond: int | None = None
    doubted: bool = False
    checked: Checked | None = None
    reasons: tuple[str, ...] = ()

    @property
    def healthy(self) -> bool:
        """Whether nothing is wrong with it; `reasons` say what is."""
        return not self.reasons

    @property
    def total_synced(self) -> int:
        """How many deliveries are done: applied, refused as older than what the secondary has, or superseded."""
        return self.applied + self.stale + self.superseded

    @property
    def total_errors(self) -> int:
        """How many times a delivery failed: to be retried, rejected, or lost with its relay."""
        return self.retried + self.rejected + self.lost


class Failure(msgspec.Struct, frozen=True):
    """A key that failed on one secondary: `retrying` at `next_attempt_at`, or `dead` until a newer event or redrive."""

    backend_id: str
    tenant_id: str
    resource_type: str
    resource_id: str
    state: str
    attempts: int
    error_code: str | None
    error: str | None
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    next_attempt_at: datetime | None
    owed: int


async def statuses(engine: AsyncEngine, config: SyncConfig) -> list[BackendSyncStatus]:
    """Return every registered secondary by name, exact and all in one snapshot, judged by the limits of `config`."""
    found: list[BackendSyncStatus] = []
    for row in await _rows(engine, LAG, config.database_schema, {}):
        columns = len(Checked.__struct_fields__)
        *known, endings = _plain(row)[:-columns]
        proof = _plain(row)[-columns:]
        checked = None if proof[0] is None else Checked(*proof)
        status = msgspec.structs.replace(BackendSyncStatus(*known), checked=checked)
        found.append(msgspec.structs.replace(status, reasons=reasons_of(status, endings, config)))
    return found


def reasons_of(status: BackendSyncStatus, endings: Sequence[str | None], config: SyncConfig) -> tuple[str, ...]:
    """Return what makes a secondary unhealthy, given how its latest attempts ended, newest first.

    Lag and pending are held against a live one only: to be paused is to fall behind. Of a removed one nothing is
    expected. What is dead stays away until somebody acts, so a single key of it is not healthy.
    """
    if status.status == "removed":
        return ()
    reasons = _behind(status, config) if status.status == "live" else []
    if status.beyond is not None:
        reasons.insert(0, f"ahead: it holds position {status.beyond:,}, which the primary has not given")
    elif status.doubted and status.checked is not None:
        # What was never compared was never said to be equal, and after every planned failover somebody would be woken.
        reasons.insert(0, "history: it may have gone back since all of it was compared (outbox reconcile)")
    if status.checked is not None and status.checked.left:
        reasons.append(f"drift: {status.checked.left:,} resources differed when last compared")
    if status.dead:
        reasons.append(f"dead keys: {status.dead:,}")
    # One that probes was open a moment ago; an alarm must not go off and on with every probe.
    if status.breaker != "closed":
        reasons.append(f"breaker {status.breaker}")
    reasons += _failing(endings, config)
    if (limit := config.unhealthy_after_silence) and status.silence > limit:
        reasons.append(f"silence: no relay has looked for {lag_text(status.silence)}")
    return tuple(reasons)


def _behind(status: BackendSyncStatus, config: SyncConfig) -> list[str]:
    reasons = []
    if config.unhealthy_lag is not None and status.lag > config.unhealthy_lag:
        reasons.append(f"lag {lag_text(status.lag)} is above {lag_text(config.unhealthy_lag)}")
    if config.unhealthy_pending is not None and status.pending > config.unhealthy_pending:
        reasons.append(f"pending {status.pending:,} is above {config.unhealthy_pending:,}")
    return reasons


def _failing(endings: Sequence[str | None], config: SyncConfig) -> list[str]:
    """Tell healthy from failing by the latest run of attempts that is long enough for either."""
    latest = True
    for well, run in groupby(endings, key=lambda code: code is None):
        codes = list(run)
        if well and len(codes) >= config.success_threshold:
            break
        if not well and len(codes) >= config.failure_threshold:
            if latest:
                return [f"attempts: the last {len(codes)} failed ({codes[0]})"]
            return [f"attempts failed ({codes[0]}), and no {config.success_threshold} in a row succeeded since"]
        latest = False
    return []


def lag_text(lag: timedelta) -> str:
    """Return a duration as a person says it: `0.4 s`, `12 s`, `3 min 5 s`, `2 h 10 min`, `4 d 3 h`."""
    seconds = lag.total_seconds()
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = int(seconds)
    for size, unit, smaller, less in ((86_400, "d", 3_600, "h"), (3_600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {less}"
    return f"{whole} s"


async def failures(engine: AsyncEngine, schema: str, backend_id: str | None = None, most: int = 100) -> list[Failure]:
    """Return up to `most` failing and dead keys, dead ones first, the longest quiet first."""
    parameters = {"backend_id": backend_id, "most": most}
    return [Failure(*row) for row in await _rows(engine, FAILURES, schema, parameters)]


async def _rows(engine: AsyncEngine, statement: Statement, schema: str, parameters: dict[str, Any]) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text(statement.on(schema)), parameters)).all()


def _plain(row: Any) -> list[Any]:
    # sum(bigint) is numeric in PostgreSQL.
    return [int(value) if type(value).__name__ == "Decimal" else value for value in row]
