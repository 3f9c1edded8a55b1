"""The pytest plugin: a PostgreSQL, a database of each test's own, a relay in the test's process, the failure lab.

Asked for by `pytest_plugins = ["outbox.testing.plugin"]` in the topmost conftest, or by `-p outbox.testing.plugin`. It
is not found by itself: whoever does not use it would wait for this package's imports in every run of pytest.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox.manager import SyncManager
from outbox.migrate import migrate
from outbox.testing.lab import FailureLab
from outbox.testing.postgres import PostgresServer, postgres_server
from outbox.testing.relay import InProcessRelay

__all__ = ["failure_lab", "outbox_dsn", "outbox_engine", "outbox_postgres", "outbox_relay"]

# Only what a crash of the machine could undo.
_FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
_TEMPLATE = "outbox_template_"

# The conformance suite then shows what it compared. What is imported already cannot be rewritten, and would warn.
_SUITE = ("outbox.testing.contract", "outbox.testing.contract_capabilities")
pytest.register_assert_rewrite(*(name for name in _SUITE if name not in sys.modules))


@pytest.fixture(scope="session")
def outbox_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL for the session: that of OUTBOX_TEST_DSN, else one in Docker, else one of our own.

    Which it was says its `origin`. Where there is none it is an error, not a skip: nothing would be shown.
    """
    with postgres_server(settings=_FAST) as server:
        yield server


@pytest.fixture(scope="session")
def _outbox_template(outbox_postgres: PostgresServer) -> Iterator[str]:
    """A database with the outbox tables, to copy from: a copy is quicker than a migration."""
    name = _TEMPLATE + uuid4().hex
    _administer(outbox_postgres, f"create database {name} template template0")
    try:
        _run(lambda: _migrated(outbox_postgres.dsn(name)))
        yield name
    finally:
        _administer(outbox_postgres, f"drop database {name} with (force)")


@pytest.fixture
def outbox_dsn(outbox_postgres: PostgresServer, _outbox_template: str) -> Iterator[str]:
    """The address (`postgresql+asyncpg://`) of a fresh database with the outbox tables, dropped after the test."""
    name = f"outbox_{uuid4().hex}"
    _administer(outbox_postgres, f"create database {name} template {_outbox_template}")
    try:
        yield outbox_postgres.dsn(name)
    finally:
        _administer(outbox_postgres, f"drop database {name} with (force)")


@pytest.fixture
def outbox_engine(outbox_dsn: str) -> AsyncEngine:
    """An engine on `outbox_dsn`. It keeps no connections, so it is good in any event loop and needs no end."""
    return create_async_engine(outbox_dsn, poolclass=NullPool)


@pytest.fixture
def outbox_relay() -> Callable[[SyncManager], InProcessRelay]:
    """What makes a relay of this process for a manager; see `InProcessRelay`."""
    return InProcessRelay


@pytest.fixture
def failure_lab(outbox_dsn: str) -> FailureLab:
    """The failure lab on a database of its own: `await failure_lab.check(MySecondary(...))`."""
    return FailureLab(create_async_engine(outbox_dsn))


async def _migrated(dsn: str) -> None:
    await migrate(create_async_engine(dsn, poolclass=NullPool))


async def _executed(dsn: str, statement: str) -> None:
    engine = create_async_engine(dsn, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.exec_driver_sql(statement)


def _administer(postgres: PostgresServer, statement: str) -> None:
    _run(lambda: _executed(postgres.dsn(), statement))


def _run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run in a thread of its own, because a fixture may be asked for inside a running event loop."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(work())).result()
