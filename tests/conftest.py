"""One PostgreSQL per session, a fresh database per test, and a plain list of what could not run."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox.migrate import migrate
from outbox.testing.child import ServerMissing
from outbox.testing.postgres import PostgresServer, postgres_server
from outbox.testing.servers import mariadb_url as open_mariadb
from outbox.testing.servers import opensearch_url as open_opensearch
from outbox.testing.servers import valkey_url as open_valkey

# Only what a crash of the machine could undo; the durability tests start servers of their own.
_FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
_SERVER = pytest.StashKey[PostgresServer]()
_ORIGINS = pytest.StashKey[set[str]]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Keep which PostgreSQL a process of the tests ran on: each has its own."""
    node.config.stash.setdefault(_ORIGINS, set()).update(getattr(node, "workeroutput", {}).get("postgres", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand the same to the process that prints."""
    config = session.config
    if _SERVER in config.stash:
        output = getattr(config, "workeroutput", {})
        output["postgres"] = [config.stash[_SERVER].origin]
        config.stash.setdefault(_ORIGINS, set()).update(output["postgres"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print which PostgreSQL it was, then every reason for which something was skipped, and how often."""
    for origin in sorted(config.stash.get(_ORIGINS, ())):
        terminalreporter.write_line(f"postgres: {origin}")
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section("could not run")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:4} skipped: {reason}")


@pytest.fixture(scope="session")
def postgres(pytestconfig: pytest.Config) -> PostgresServer:
    """The session's server. Its absence is an error, not a skip: nothing would be shown."""
    return _postgres(pytestconfig)


@pytest.fixture
def database(postgres: PostgresServer) -> Iterator[str]:
    """The asyncpg URL of an empty database of this test alone."""
    with new_database(postgres) as name:
        yield postgres.dsn(name)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every account can reach, which below pytest's own is not so for root."""
    with TemporaryDirectory(prefix="outbox-test-") as path:
        Path(path).chmod(0o755)
        yield Path(path)


@pytest.fixture(scope="session")
def opensearch_url() -> Iterator[str]:
    yield from _or_skip(open_opensearch)


@pytest.fixture(scope="session")
def valkey_url() -> Iterator[str]:
    yield from _or_skip(open_valkey)


@pytest.fixture(scope="session")
def mariadb_url() -> Iterator[str]:
    yield from _or_skip(open_mariadb)


@contextmanager
def new_database(postgres: PostgresServer, template: str = "template0") -> Iterator[str]:
    """Yield the name of a new copy of `template`, dropped at the end whoever is still on it."""
    name = f"outbox_{uuid4().hex[:16]}"
    _administer(postgres, "create database {} template {}", name, template)
    try:
        yield name
    finally:
        _administer(postgres, "drop database {} with (force)", name)


def _administer(postgres: PostgresServer, statement: str, *names: str) -> None:
    with psycopg.connect(postgres.dsn(driver="postgresql"), autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _postgres(config: pytest.Config) -> PostgresServer:
    if _SERVER not in config.stash:
        running = ExitStack()
        config.add_cleanup(running.close)
        config.stash[_SERVER] = running.enter_context(postgres_server(settings=_FAST))
    return config.stash[_SERVER]


def _or_skip(opened: Callable[[], AbstractContextManager[str]]) -> Iterator[str]:
    """Skip when a server is not installed; one that is installed and fails is an error."""
    with ExitStack() as running:
        try:
            url = running.enter_context(opened())
        except ServerMissing as missing:
            pytest.skip(str(missing))
        yield url


@pytest.fixture(scope="session")
def template(postgres: PostgresServer) -> Iterator[str]:
    """A database with the outbox tables, to copy from: a copy is quicker than a migration."""
    with new_database(postgres) as name:
        asyncio.run(_migrate(postgres.dsn(name)))
        yield name


@pytest.fixture
async def primary(postgres: PostgresServer, template: str) -> AsyncIterator[AsyncEngine]:
    """An engine on a fresh database that has the outbox tables."""
    with new_database(postgres, template) as name:
        engine = create_async_engine(postgres.dsn(name))
        yield engine
        # A bell that is cut off with the loop leaves its connection to the collector, in some later test.
        if ringing := [task for task in asyncio.all_tasks() if task.get_name() == "outbox-doorbell"]:
            await asyncio.wait(ringing)
        await engine.dispose()


async def _migrate(dsn: str) -> None:
    engine = create_async_engine(dsn, poolclass=NullPool)
    await migrate(engine)
    await engine.dispose()
