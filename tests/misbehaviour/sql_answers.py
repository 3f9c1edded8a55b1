"""What a SQL database does, though connections are well: all by the database itself."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import create_async_engine

from tests.misbehaviour.faults import POISON, Fault, Section
from tests.misbehaviour.outcomes import Away, Blamed, Cannot, Done, OneDead, OneRetried
from tests.misbehaviour.stands import Stand

Made = Callable[[Stand], AbstractAsyncContextManager[None]]
SHORT = 0.7

PG_TRIGGER = """
create function spoil() returns trigger language plpgsql as $$ begin
    if new.resource_id like '{which}' then {does}; end if; return new;
end $$
"""
PG_FIRES = "create trigger spoil before insert on outbox_resources for each row execute function spoil()"
PG_ENDS = "select pg_terminate_backend(pid) from pg_stat_activity where usename = '{role}'"
MY_TRIGGER = """
create trigger spoil_{role} before insert on {table} for each row begin
    if new.resource_id like '{which}' then {does}; end if;
end
"""
MY_SIGNAL = "signal sqlstate '{state}' set mysql_errno = {number}"


async def run(stand: Stand, *statements: str) -> None:
    """As the administrator; who or what the stand is about stands in braces."""
    async with stand.hands["admin"].connect() as connection:
        for statement in statements:
            await connection.exec_driver_sql(statement)


async def end_sessions(stand: Stand) -> None:
    """End what the role has open, so that its next sessions begin under new rules."""
    role = stand.hands["role"]
    if "table" not in stand.hands:
        await run(stand, PG_ENDS.format(role=role))
        return
    async with stand.hands["admin"].connect() as connection:
        found = await connection.exec_driver_sql(f"select id from information_schema.processlist where user = '{role}'")
        for (session,) in found.fetchall():
            await connection.exec_driver_sql(f"kill {session}")


def triggered(postgres: str, mariadb: str, which: str = "%") -> Made:
    """Rows whose id is like `which` meet a trigger."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        if "table" not in stand.hands:
            await run(stand, PG_TRIGGER.format(which=which, does=postgres), PG_FIRES)
            yield
            await run(stand, "drop trigger spoil on outbox_resources", "drop function spoil()")
        else:
            names = {name: stand.hands[name] for name in ("role", "table")}
            await run(stand, MY_TRIGGER.format(which=which, does=mariadb, **names).replace("%", "%%"))
            yield
            await run(stand, f"drop trigger spoil_{names['role']}")

    return make


def raised(state: str, mariadb: tuple[str, int], which: str = "%") -> Made:
    signal = MY_SIGNAL.format(state=mariadb[0], number=mariadb[1])
    return triggered(f"raise exception using errcode = '{state}'", signal, which)


def ruled(postgres: tuple[str, str], mariadb: tuple[str, str]) -> Made:
    """A rule about the role, and its end; sessions are ended in between, as rules are for new ones."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        begin, end = mariadb if "table" in stand.hands else postgres
        await run(stand, begin.format(**stand.hands))
        await end_sessions(stand)
        yield
        await run(stand, end.format(**stand.hands))

    return make


@asynccontextmanager
async def slow_row(stand: Stand) -> AsyncIterator[None]:
    """The server allows a statement half a second, and one row takes a minute."""
    limit = ruled(
        ("alter role {role} set statement_timeout = '500ms'", "alter role {role} reset statement_timeout"),
        ("alter user {role} with max_statement_time 0.5", "alter user {role} with max_statement_time 0"),
    )
    asleep = triggered("perform pg_sleep(60)", "do sleep(60)", POISON)
    async with asleep(stand), limit(stand):
        yield
        await end_sessions(stand)


@asynccontextmanager
async def locked_row(stand: Stand) -> AsyncIterator[None]:
    """Somebody has written one row, and does not commit."""
    table = stand.hands.get("table", "outbox_resources")
    insert = f"insert into {table} (tenant_id, resource_type, resource_id, position) values ('default','Thing',:id,0)"
    async with stand.hands["admin"].connect() as other:
        await other.execution_options(isolation_level="READ COMMITTED")
        await other.execute(sa.text(insert), {"id": POISON})
        yield
        await other.rollback()


@asynccontextmanager
async def no_connection_left(stand: Stand) -> AsyncIterator[None]:
    rule = ruled(
        ("alter role {role} connection limit 0", "alter role {role} connection limit -1"),
        ("alter user {role} with max_user_connections 1", "alter user {role} with max_user_connections 0"),
    )
    async with rule(stand), taken(stand):
        yield


@asynccontextmanager
async def taken(stand: Stand) -> AsyncIterator[None]:
    """MariaDB takes no limit of none: the one connection is somebody else's."""
    if "table" not in stand.hands:
        yield
        return
    url = stand.hands["admin"].url.set(username=stand.hands["role"], password="x")
    engine = create_async_engine(url)
    async with engine.connect():
        await stand.line.refuse() if stand.line else None
        await stand.line.mend() if stand.line else None
        yield
    await engine.dispose()


@asynccontextmanager
async def sessions_ended(stand: Stand) -> AsyncIterator[None]:
    await end_sessions(stand)
    yield


def sqlite_pragma(begin: str, end: str) -> Made:
    """On the one connection of the pool."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        async with stand.hands["engine"].connect() as connection:
            await connection.exec_driver_sql(begin)
        yield
        async with stand.hands["engine"].connect() as connection:
            await connection.exec_driver_sql(end)

    return make


@asynccontextmanager
async def sqlite_locked(stand: Stand) -> AsyncIterator[None]:
    with closing(sqlite3.connect(stand.hands["file"], isolation_level=None)) as other:
        other.execute("begin immediate")
        yield
        other.execute("rollback")


@asynccontextmanager
async def sqlite_refuses(stand: Stand) -> AsyncIterator[None]:
    with closing(sqlite3.connect(stand.hands["file"], isolation_level=None)) as other:
        body = f"when new.resource_id = '{POISON}' begin select raise(abort, 'secret'); end"
        other.execute(f"create trigger spoil before insert on outbox_resources {body}")
        yield
        other.execute("drop trigger spoil")


def on(**made: Made) -> Made:
    """One fault, made in another way on each database; `other` is the way of both servers."""

    @asynccontextmanager
    async def make(stand: Stand) -> AsyncIterator[None]:
        way = made["sqlite"] if "file" in stand.hands else made["other"]
        async with way(stand):
            yield

    return make


ONE_WRITER = Cannot("one writer at a time")
WHOLE_FILE = Cannot("its lock is the whole file's")
NO_SESSIONS = Cannot("no sessions")

SQL = Section(
    "What a SQL database does",
    [
        (
            Fault(
                "one row violates a constraint",
                on(other=raised("23514", ("23000", 4025), POISON), sqlite=sqlite_refuses),
            ),
            {
                "postgres": OneDead("23514"),
                "mariadb": OneDead("23000"),
                "sqlite": OneDead("SQLITE_CONSTRAINT_TRIGGER"),
            },
        ),
        (
            Fault("one row meets a deadlock each time", raised("40P01", ("40001", 1213), POISON)),
            {"postgres": OneRetried("40P01"), "mariadb": OneRetried("40001"), "sqlite": ONE_WRITER},
        ),
        (
            Fault("every row meets a deadlock each time", raised("40P01", ("40001", 1213))),
            {"postgres": Blamed("40P01"), "mariadb": Blamed("40001"), "sqlite": ONE_WRITER},
        ),
        (
            Fault("one row cannot be serialized", raised("40001", ("40001", 1020), POISON)),
            {"postgres": OneRetried("40001"), "mariadb": OneRetried("40001"), "sqlite": ONE_WRITER},
        ),
        (
            Fault("one row is locked by somebody for good", locked_row, SHORT),
            {"postgres": OneRetried("timeout"), "mariadb": OneRetried("timeout"), "sqlite": WHOLE_FILE},
        ),
        (
            Fault("everything is locked by somebody for good", sqlite_locked),
            {
                "postgres": Cannot("locks are of rows"),
                "mariadb": Cannot("locks are of rows"),
                "sqlite": Away("SQLITE_BUSY"),
            },
        ),
        (
            Fault("one row takes longer than the server allows", slow_row),
            {"postgres": OneRetried("timeout"), "mariadb": OneRetried("timeout"), "sqlite": Cannot("no such limit")},
        ),
        (
            Fault(
                "the disk is full",
                on(
                    other=raised("53100", ("HY000", 1114)),
                    sqlite=sqlite_pragma("pragma max_page_count = 1", "pragma max_page_count = 1000000"),
                ),
                poison='{"value":"' + "x" * 100_000 + '"}',
            ),
            {"postgres": Away("53100"), "mariadb": Away("1114"), "sqlite": Away("SQLITE_FULL")},
        ),
        (
            Fault(
                "it may only be read",
                on(
                    other=raised("25006", ("HY000", 1290)),
                    sqlite=sqlite_pragma("pragma query_only = on", "pragma query_only = off"),
                ),
            ),
            {"postgres": Away("25006"), "mariadb": Away("1290"), "sqlite": Away("SQLITE_READONLY")},
        ),
        (
            Fault("no connection is left", no_connection_left),
            {"postgres": Away("53300"), "mariadb": Away("42000"), "sqlite": NO_SESSIONS},
        ),
        (
            Fault(
                "nobody may log in",
                ruled(
                    ("alter role {role} nologin", "alter role {role} login"),
                    ("alter user {role} account lock", "alter user {role} account unlock"),
                ),
            ),
            {"postgres": Away("28000"), "mariadb": Away("4151"), "sqlite": NO_SESSIONS},
        ),
        (
            Fault(
                "the right to write is taken away",
                ruled(
                    (
                        "revoke insert on outbox_resources from {role}",
                        "grant insert on outbox_resources to {role}",
                    ),
                    ("revoke insert on outbox.* from {role}", "grant insert on outbox.* to {role}"),
                ),
            ),
            {"postgres": Away("42501"), "mariadb": Away("42000"), "sqlite": Cannot("no rights")},
        ),
        (
            Fault("an administrator ends idle sessions", sessions_ended),
            {"postgres": Done(), "mariadb": Done(), "sqlite": NO_SESSIONS},
        ),
    ],
    {
        "memory": "no database",
        "opensearch": "no SQL",
        "elasticsearch": "no SQL",
        "valkey": "no SQL",
        "storage": "its store's affair",
    },
)
