"""Migrate: bring the outbox tables of a database to what this code needs."""

from __future__ import annotations

import io
from importlib.resources import files
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SchemaMissing
from outbox.schema import check_identifier

__all__ = ["check_schema", "migrate", "migration_sql", "migrations_directory"]

_NEXT = "run `outbox migrate` (or `outbox migrate --sql` and apply what it prints)"


def migrations_directory() -> Path:
    """Return where our alembic scripts are: inside an installed wheel, or beside the package in a checkout.

    An application takes them into its own tree with
    `version_locations = <its own>:<this directory>/versions`; our branch label is `outbox`.
    """
    installed = Path(str(files("outbox"))) / "migrations"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "migrations"


async def migrate(engine: AsyncEngine, schema: str = "public", revision: str = "head") -> None:
    """Upgrade the outbox tables of a database to `revision`. Concurrent calls wait for each other."""
    async with engine.connect() as connection:
        await connection.run_sync(_upgrade, schema, revision)


def migration_sql(schema: str = "public", revision: str = "head") -> str:
    """Return the SQL that `migrate` would run on an empty database."""
    printed = io.StringIO()
    config = _config(schema)
    config.output_buffer = printed
    command.upgrade(config, revision, sql=True)
    return printed.getvalue()


async def check_schema(engine: AsyncEngine, schema: str = "public") -> None:
    """Raise `SchemaMissing` unless the tables are there and know every migration of this code."""
    check_identifier(schema)
    async with engine.connect() as connection:
        found = await connection.run_sync(_applied, schema)
    if not found:
        raise SchemaMissing(f"schema {schema!r} has no outbox tables: {_NEXT}")
    if not found & _known_heads(schema):
        raise SchemaMissing(f"the outbox tables in schema {schema!r} are of another version than this code: {_NEXT}")


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
