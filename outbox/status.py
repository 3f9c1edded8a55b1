"""Status: what is owed to whom, and how old it is. Read-only; the one source for people, programs and pages."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.schema import Statement

__all__ = ["FAILURES", "LAG", "BackendSyncStatus", "Failure", "failures", "statuses"]

LAG = Statement("""
select backend_id, status, pending, in_flight, failing, dead, coalesce(lag, interval '0') as lag, breaker,
       last_success_at, last_error_at, last_error_code, applied, stale, superseded, retried, rejected, lost
from {schema}.outbox_lag
order by backend_id
""")

FAILURES = Statement("""
select backend_id, tenant_id, resource_type, resource_id, state, attempts, error_code, error,
       first_failed_at, last_failed_at, next_attempt_at, cardinality(event_ids) as owed
from {schema}.outbox_hold
where state in ('retrying', 'dead') and (cast(:backend_id as text) is null or backend_id = :backend_id)
order by state, last_failed_at
limit :most
""")


class BackendSyncStatus(msgspec.Struct, frozen=True):
    """One secondary, as the database knows it: the same from every process, right after a restart.

    `pending` counts every delivery still owed, those in flight, failing and dead included; `lag` is the age of the
    oldest of them by the database's clock, zero when nothing is owed. `failing` and `dead` count keys. The totals count
    deliveries since the secondary was registered.
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


async def statuses(engine: AsyncEngine, schema: str) -> list[BackendSyncStatus]:
    """Return every registered secondary by name, exact and all in one snapshot."""
    return [BackendSyncStatus(*_plain(row)) for row in await _rows(engine, LAG, schema, {})]


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
