"""Migrate: bring the outbox tables of a database to what this code needs."""

from __future__ import annotations

import asyncio
import io
from importlib.resources import files
from pathlib import Path
from weakref import WeakKeyDictionary

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SchemaMissing
from outbox.schema import metadata
from outbox.statement import check_identifier

__all__ = ["check_schema", "migrate", "migration_sql", "migrations_directory"]

# Alembic keeps what it works on in globals, so that in one loop only one migration may be under way.
_ONE_AT_A_TIME: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

_NEXT = "run `outbox migrate` (or `outbox migrate --sql` and apply what it prints)"


def migrations_directory() -> Path:
    """Return where our alembic scripts are: inside an installed wheel, or beside the package in a checkout.

    An application takes them into its own tree with
    `version_locations = <its own>:<this directory>/versions`; our branch label is `outbox`.
    """
    installed = Path(str(files("outbox"))) / "migrations"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "migrations"


async def migrate(engine: AsyncEngine, schema: str = "public", revision: str = "head") -> None:
    """Upgrade the outbox tables of a database to `revision`. Concurrent calls wait for each other, in any process."""
    lock = _ONE_AT_A_TIME.setdefault(asyncio.get_running_loop(), asyncio.Lock())
    async with lock, engine.connect() as connection:
        await connection.run_sync(_upgrade, schema, revision)


def migration_sql(schema: str = "public", revision: str = "head") -> str:
    """Return the SQL that `migrate` would run on an empty database."""
    printed = io.StringIO()
    config = _config(schema)
    config.output_buffer = printed
    command.upgrade(config, revision, sql=True)
    return printed.getvalue()


async def check_schema(engine: AsyncEngine, schema: str = "public") -> None:
    """Raise `SchemaMissing` unless the tables have what this code needs, whoever migrated them.

    Our own version table, where there is one, must also name a version that this code knows.
    """
    check_identifier(schema)
    async with engine.connect() as connection:
        missing = await connection.run_sync(_missing, schema)
        applied = await connection.run_sync(_applied, schema)
    if "outbox" in missing:
        raise SchemaMissing(f"schema {schema!r} has no outbox tables: {_NEXT}")
    if missing or (applied and not applied & _known_heads(schema)):
        raise SchemaMissing(f"the outbox tables in schema {schema!r} are of another version than this code: {_NEXT}")


def _missing(connection: Connection, schema: str) -> list[str]:
    """Return the tables and columns that are not there; in an application's own tree no version table tells."""
    found = inspect(connection)
    there = set(found.get_table_names(schema))
    missing: list[str] = []
    for table in metadata(schema).sorted_tables:
        if table.name not in there:
            missing.append(table.name)
        else:
            columns = {column["name"] for column in found.get_columns(table.name, schema)}
            missing += [f"{table.name}.{column.name}" for column in table.columns if column.name not in columns]
    return missing


def _applied(connection: Connection, schema: str) -> set[str]:
    options = {"version_table": "outbox_version", "version_table_schema": schema}
    return set(MigrationContext.configure(connection, opts=options).get_current_heads())


def _upgrade(connection: Connection, schema: str, revision: str) -> None:
    config = _config(schema)
    config.attributes["connection"] = connection
    command.upgrade(config, revision)
    connection.commit()


def _known_heads(schema: str) -> set[str]:
    return set(ScriptDirectory.from_config(_config(schema)).get_heads())


def _config(schema: str) -> Config:
    check_identifier(schema)
    config = Config()
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["schema"] = schema
    return config
