"""Crashes that take with them what nobody committed: positions, and transaction ids."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg

from outbox.testing.postgres import EmbeddedPostgres
from tests.relaying import own_server

_QUIET = {"autovacuum": "off", "wal_level": "minimal", "max_wal_senders": "0"}
_LOG_WRITER = "select pid from pg_stat_activity where backend_type = 'walwriter'"


@contextmanager
def forgetful_server() -> Iterator[EmbeddedPostgres]:
    """A server where nobody writes to the log by chance; crash it with its log held."""
    with own_server(**_QUIET) as server:
        yield server


@contextmanager
def log_held(server: EmbeddedPostgres) -> Iterator[Callable[[], None]]:
    """Bring nothing to disk from now on but what is committed, and give what crashes the server in that state.

    The log's own writer would do so from time to time and, on PostgreSQL 15 and 16, after whatever was rolled back.
    """
    with psycopg.connect(server.dsn(driver="postgresql"), autocommit=True) as connection:
        # From here on the log has to tell of every position and transaction id anew.
        connection.execute("checkpoint")
        [[writer]] = connection.execute(_LOG_WRITER)
    os.kill(writer, signal.SIGSTOP)

    def crash() -> None:
        # First the writer, which is a crash already: it would not see that its server is gone.
        os.kill(writer, signal.SIGKILL)
        server.crash()

    yield crash
