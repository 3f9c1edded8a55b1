"""The engine behind a SQL secondary: which databases serve, and how their sessions are set up."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.errors import SettingsError
from outbox.secondaries.sql_table import MYSQL

__all__ = ["engine_of"]


def engine_of(given: AsyncEngine | sa.URL | str, timeout: timedelta) -> AsyncEngine:
    """Return the engine given, or one made for a URL, whose waits for locks end well within `timeout`.

    Raises `SettingsError` for a database that could not keep the promise.
    """
    url = given.url if isinstance(given, AsyncEngine) else sa.make_url(given)
    database = url.get_backend_name()
    if database not in ("postgresql", "sqlite", *MYSQL):
        raise SettingsError("engine_or_url", "must be of PostgreSQL, MariaDB, MySQL or SQLite")
    if database == "sqlite" and url.database in (None, "", ":memory:"):
        raise SettingsError("engine_or_url", "SQLite in memory is lost with its connection; name a file")
    if isinstance(given, AsyncEngine):
        return given
    # SQLite has one writer: in one process they take turns at the pool, not by trying again and again. Elsewhere an
    # upsert at this level waits for other writers, where a higher one would fail or lock the gaps between keys.
    options: dict[str, Any] = {"isolation_level": "READ COMMITTED"}
    if database == "sqlite":
        options = {"pool_size": 1, "max_overflow": 0}
    elif database in MYSQL and "init_command" not in url.query:
        # It does not notice that a client gave up: what waits for a lock keeps all the locks that it has.
        waits = max(1, int(timeout.total_seconds() / 6))
        options["connect_args"] = {"init_command": f"set session innodb_lock_wait_timeout = {waits}"}
    return create_async_engine(given, pool_pre_ping=True, hide_parameters=True, **options)
