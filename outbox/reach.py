"""Reach: find the manager or the primary that a command is about, and say in a sentence why it cannot be reached."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.config import engine_on, manager_from_config
from outbox.errors import OutboxError
from outbox.manager import SyncManager
from outbox.migrate import check_schema
from outbox.primary import PRIMARY_FAILED
from outbox.settings import SyncConfig
from outbox.statement import check_identifier

__all__ = [
    "Named",
    "Tables",
    "Unreached",
    "manager_for",
    "manager_of",
    "named",
    "place_of",
    "reached",
    "tables_of",
    "using",
]

_REFUSALS = {
    "25006": "only reads, as a standby does: give the primary's address",
    "28000": "refuses this account: check its user and its pg_hba.conf",
    "28P01": "refuses the password: check user and password of the address",
    "3D000": "has no such database: create it, or correct the address",
    "3F000": "has no such schema: create it, or name another with --schema",
    "42501": "denies a permission that this needs: ask for it, or use an account that has it",
    "42P01": "misses a table of the outbox: run `outbox migrate`",
    "53300": "has no connection left: close some, or raise max_connections",
    "55P03": "did not give a lock in time: `outbox doctor` names long transactions; end the one that holds it",
    "57P03": "is starting up or shutting down: try again in a moment",
}


class Unreached(OutboxError):
    """What a command is about was not named, is not there, does not answer, or refuses."""


class Named(NamedTuple):
    """What a command is about: one of these, or nothing."""

    app: str | None
    config: Path | None
    dsn: str | None


class Tables(NamedTuple):
    """The outbox tables of a primary: the way to it, the settings, and the secondaries that are known beforehand."""

    engine: AsyncEngine
    config: SyncConfig
    expected: tuple[str, ...] = ()

    @property
    def schema(self) -> str:
        """The schema of the tables."""
        return self.config.database_schema


def named(app: str | None, config: Path | None, dsn: str | None = None) -> Named:
    """Return the one that was typed, else the one the environment names: application, configuration or address.

    Raises `Unreached` when two were typed, which may be of different primaries.
    """
    typed = {"--app": app, "--config": config, "--dsn": dsn}
    given = [option for option, value in typed.items() if value is not None]
    if len(given) > 1:
        raise Unreached(f"{' and '.join(given)} may name different primaries: give one of them")
    if given:
        return Named(app, config, dsn)
    if app := os.environ.get("OUTBOX_APP"):
        return Named(app, None, None)
    if path := os.environ.get("OUTBOX_CONFIG"):
        return Named(None, Path(path), None)
    return Named(None, None, os.environ.get("OUTBOX_DSN"))


def manager_of(app: str | None, config: Path | None) -> SyncManager:
    """Return the manager that `--app module:attribute` or `--config FILE` names. Raises `OutboxError`."""
    app, config, _ = named(app, config)
    if app is not None:
        return _manager_in_code(app)
    if config is not None:
        return manager_from_config(config)
    raise Unreached("no manager is named: give --app module:attribute, or --config with a file that describes one")


def tables_of(app: str | None, config: Path | None, dsn: str | None, schema: str | None) -> Tables:
    """Return the tables of the application, the configuration or the address that is `named`."""
    app, config, dsn = named(app, config, dsn)
    if app is not None or config is not None:
        manager = manager_of(app, config)
        expected = tuple(each.backend_id for each in manager.registrations)
        return Tables(manager.engine, _in_schema(manager.config, schema), expected)
    if not dsn:
        raise Unreached("no primary is named: give --dsn, or OUTBOX_DSN in the environment, or --app, or --config")
    return Tables(engine_on(dsn), _in_schema(SyncConfig.load(), schema))


def manager_for(app: str | None, config: Path | None, dsn: str | None, schema: str | None) -> SyncManager:
    """Return the manager that is `named`, or for an address one that has no secondaries of its own.

    Raises `Unreached` when `schema` is not the manager's: it says itself where its tables are.
    """
    app, config, dsn = named(app, config, dsn)
    if app is None and config is None:
        tables = tables_of(None, None, dsn, schema)
        return SyncManager(tables.engine, config=tables.config)
    manager = manager_of(app, config)
    own = manager.config.database_schema
    if schema not in (None, own):
        raise Unreached(f"--schema {schema}: this manager's tables are in {own}, by its database_schema")
    return manager


def _in_schema(config: SyncConfig, schema: str | None) -> SyncConfig:
    if schema is None:
        return config
    check_identifier(schema)
    return config.model_copy(update={"database_schema": schema})


def place_of(engine: AsyncEngine) -> str:
    """Return where an engine leads, as host:port/database: without account, password and options."""
    url = engine.url
    return f"{url.host or 'localhost'}:{url.port or 5432}/{url.database or ''}"


@asynccontextmanager
async def reached(engine: AsyncEngine) -> AsyncIterator[None]:
    """Raise `Unreached` for whatever the primary may fail with, and dispose of the engine at the end."""
    try:
        yield
    except PRIMARY_FAILED as error:
        raise Unreached(f"PostgreSQL at {place_of(engine)} {_problem(error)}") from error
    finally:
        await engine.dispose()


@asynccontextmanager
async def using(manager: SyncManager) -> AsyncIterator[None]:
    """The same for a manager whose tables are there. Raises `SchemaMissing` when they are not."""
    async with reached(manager.engine):
        try:
            await check_schema(manager.engine, manager.config.database_schema)
            yield
        finally:
            # First: what still rings or pushes would put its connection into a pool that nobody empties again.
            await manager.aclose()


def _problem(error: BaseException) -> str:
    """Say what is wrong and what to do, by types and codes: a server's own words may quote values."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlstate", None)
    if isinstance(code, str):
        return _REFUSALS.get(code, f"refused what was asked of it (SQLSTATE {code})")
    if isinstance(cause, socket.gaierror):
        return "has a host name that is not known here: correct the address"
    if isinstance(cause, (OSError, TimeoutError)):
        return f"does not answer ({type(cause).__name__}): is it running, and is the address right?"
    return f"failed ({type(cause).__name__})"


def _manager_in_code(reference: str) -> SyncManager:
    module_name, colon, attribute = reference.partition(":")
    if not colon or not module_name or not attribute:
        raise Unreached(f"--app {reference}: must be module:attribute, such as shop.sync:manager")
    # As `python -m` does it: the application is looked for where the command is run.
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as missing:
        # What the application itself misses is its own error, told with its own traceback.
        if missing.name is None or not f"{module_name}.".startswith(f"{missing.name}."):
            raise
        where = f"in {Path.cwd()} or among what is installed"
        raise Unreached(f"--app {reference}: there is no module {missing.name} {where}") from None
    for name in attribute.split("."):
        found = getattr(found, name, None)
    if not isinstance(found, SyncManager):
        raise Unreached(f"--app {reference}: is {_kind_of(found)}, not a SyncManager")
    return found


def _kind_of(found: Any) -> str:
    return "nothing that is there" if found is None else f"of type {type(found).__name__}"
