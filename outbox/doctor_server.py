"""Doctor, server: whether this PostgreSQL, and what stands before it, keeps what it acknowledges and has room."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import text

from outbox.finding import Case, Check, Finding, found_ok, found_unknown, found_warning, found_wrong
from outbox.statement import Statement
from outbox.status import lag_text

__all__ = [
    "ACTIVITY",
    "BACKEND",
    "CLOCK",
    "CONNECTIONS",
    "DURABILITY",
    "PREPARED",
    "SERVER_CHECKS",
    "SLOTS",
    "VERSION",
]

_OLDEST_VERSION = 15
_LONG = timedelta(minutes=5)
_CLOCKS_APART = timedelta(seconds=5)
_FULL = 0.8

VERSION = Statement("""
select cast(current_setting('server_version_num') as integer) / 10000 as major,
       current_setting('server_version') as version, pg_is_in_recovery() as standby
""")

DURABILITY = Statement("""
select current_setting('synchronous_commit') as synchronous_commit, current_setting('fsync') as fsync,
       current_setting('full_page_writes') as full_page_writes
""")

CONNECTIONS = Statement("""
select cast((select sum(numbackends) from pg_stat_database) as integer) as used,
       cast(current_setting('max_connections') as integer)
           - cast(current_setting('superuser_reserved_connections') as integer) as allowed
""")

CLOCK = Statement("select clock_timestamp() as at")

# Of every database of the cluster: each of them holds back vacuum in this one.
ACTIVITY = Statement("""
select coalesce(max(statement_timestamp() - xact_start), interval '0') as age,
       (array_agg(datname order by xact_start))[1] as database,
       pg_has_role(current_user, 'pg_read_all_stats', 'usage') as sees_all
from pg_stat_activity
where backend_type = 'client backend' and pid <> pg_backend_pid() and xact_start is not null
""")

PREPARED = Statement("""
select count(*) as transactions, coalesce(max(statement_timestamp() - prepared), interval '0') as age
from pg_prepared_xacts
""")

SLOTS = Statement("""
select slot_name from pg_replication_slots where not active and (restart_lsn is not null or xmin is not null)
order by slot_name
""")

BACKEND = Statement("select pg_backend_pid() as pid")


async def _version(case: Case) -> Sequence[Finding]:
    major, version, standby = await case.row(VERSION)
    if standby:
        return found_wrong("version", "this server is a standby: nothing can be written to it", "name the primary")
    if major < _OLDEST_VERSION:
        said = f"PostgreSQL {version} is older than {_OLDEST_VERSION}, the first that works"
        return found_wrong("version", said, f"upgrade the server to PostgreSQL {_OLDEST_VERSION} or newer")
    return found_ok("version", f"PostgreSQL {version}")


async def _durability(case: Case) -> Sequence[Finding]:
    commits, *others = await case.row(DURABILITY)
    off = [
        name
        for name, value in zip(("synchronous_commit", "fsync", "full_page_writes"), (commits, *others), strict=True)
        if value == "off"
    ]
    if off:
        said = f"{' and '.join(off)} off: a crash may lose changes that a secondary already has"
        return found_warning(
            "durability", said, "switch it on, at least for the roles that write events and that relay"
        )
    return found_ok("durability", f"what is committed survives a crash (synchronous_commit {commits})")


async def _connections(case: Case) -> Sequence[Finding]:
    used, allowed = await case.row(CONNECTIONS)
    said = f"{used} of {allowed} connections are used"
    needed = case.config.relay_connections + 1
    if used > _FULL * allowed or allowed - used < needed:
        return found_warning("connections", f"{said}; a relay takes {needed}", "raise max_connections, or use less")
    return found_ok("connections", said)


async def _clock(case: Case) -> Sequence[Finding]:
    before = datetime.now(UTC)
    (at,) = await case.row(CLOCK)
    apart = max(before - at, at - datetime.now(UTC), timedelta(0))
    if apart > _CLOCKS_APART:
        said = f"the clocks of this machine and of the primary are {lag_text(apart)} apart"
        return found_warning("clock", said, "nothing here depends on it, but times in logs will not match")
    return found_ok("clock", "this machine and the primary agree")


async def _transactions(case: Case) -> Sequence[Finding]:
    age, database, sees_all = await case.row(ACTIVITY)
    if age > _LONG:
        said = f"a transaction in database {database} is open for {lag_text(age)} and holds back vacuum everywhere"
        return found_warning("transactions", said, "end it, or set idle_in_transaction_session_timeout")
    if not sees_all:
        return found_unknown(
            "transactions",
            "this role sees only its own transactions",
            "grant pg_read_all_stats to it, or ask as another",
        )
    return found_ok("transactions", f"the oldest is open for {lag_text(age)}")


async def _prepared(case: Case) -> Sequence[Finding]:
    transactions, age = await case.row(PREPARED)
    if age > _LONG:
        said = (
            f"{transactions} prepared transactions, the oldest of {lag_text(age)} ago, hold back vacuum and their locks"
        )
        return found_warning("prepared", said, "commit or roll back what pg_prepared_xacts lists")
    return found_ok("prepared", f"{transactions} prepared transactions wait")


async def _slots(case: Case) -> Sequence[Finding]:
    if names := [name for (name,) in await case.rows(SLOTS)]:
        said = f"nobody reads replication slot {', '.join(names)}, which keeps log and may hold back vacuum"
        return found_warning("slots", said, "connect its reader, or drop it with pg_drop_replication_slot")
    return found_ok("slots", "every replication slot has its reader")


async def _pooler(case: Case) -> Sequence[Finding]:
    """Two clients that are served by one session in turns, or one by two, are not connected to PostgreSQL itself."""
    statement = text(BACKEND.on(case.config.database_schema))
    async with case.engine.connect() as plain, case.engine.connect() as other:
        one = await plain.execution_options(isolation_level="AUTOCOMMIT")
        first = (await one.execute(statement)).scalar_one()
        # In a transaction that stays open: whoever shares sessions cannot give this one to anybody else.
        second = (await other.execute(statement)).scalar_one()
        again = (await one.execute(statement)).scalar_one()
    if first == second or first != again:
        said = "between here and PostgreSQL is a pooler that shares sessions between transactions"
        advice = "give relays an address that leads to PostgreSQL itself, or to a pooler in session mode"
        return found_warning("pooler", said, advice)
    return found_ok("pooler", "sessions are our own")


SERVER_CHECKS: dict[str, Check] = {
    "version": _version,
    "durability": _durability,
    "connections": _connections,
    "clock": _clock,
    "transactions": _transactions,
    "prepared": _prepared,
    "slots": _slots,
    "pooler": _pooler,
}
"""By the name of their finding."""
