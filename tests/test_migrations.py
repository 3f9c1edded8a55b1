"""Migrations: from nothing to what the code declares and back, by every way a user may take."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import MemorySecondary, SyncConfig, SyncEvent, SyncManager
from outbox.errors import SchemaMissing
from outbox.migrate import check_schema, migrate, migration_sql, migrations_directory
from outbox.schema import metadata

ROOT = Path(__file__).parent.parent
TABLES = {
    "outbox",
    "outbox_attempt",
    "outbox_backfill",
    "outbox_delivery",
    "outbox_discarded",
    "outbox_hold",
    "outbox_reconciliation",
    "outbox_secondary",
}

# Everything a migration can get wrong, as PostgreSQL itself would write it.
CATALOG = {
    "relations": """
        select relname, relkind, relpersistence, array(select unnest(reloptions) order by 1)
        from pg_class where relnamespace = to_regnamespace(:schema)
    """,
    "columns": """
        select relname, attnum, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attstorage,
               collname, pg_get_expr(adbin, adrelid)
        from pg_class
        join pg_attribute on attrelid = pg_class.oid and attnum > 0 and not attisdropped
        left join pg_attrdef on adrelid = attrelid and adnum = attnum
        left join pg_collation on pg_collation.oid = attcollation
        where relnamespace = to_regnamespace(:schema) and relkind in ('r', 'v')
    """,
    "constraints": """
        select conrelid::regclass::text, conname, contype, convalidated, pg_get_constraintdef(pg_constraint.oid)
        from pg_constraint where connamespace = to_regnamespace(:schema)
    """,
    "indexes": "select indexname, indexdef from pg_indexes where schemaname = :schema",
    "sequences": """
        select sequencename, data_type::text, start_value, increment_by, cache_size, cycle
        from pg_sequences where schemaname = :schema
    """,
    "views": "select viewname, definition from pg_views where schemaname = :schema",
}


@pytest.fixture
async def engine(database: str) -> AsyncIterator[AsyncEngine]:
    """An engine on an empty database with two schemas beside `public`."""
    engine = create_async_engine(database, poolclass=NullPool)
    async with engine.begin() as connection:
        await connection.execute(text("create schema migrated"))
        await connection.execute(text("create schema declared"))
    yield engine
    await engine.dispose()


async def catalog(engine: AsyncEngine, schema: str, *but: str) -> dict[str, list[str]]:
    """All that is in a schema, as lines of text, without what begins with one of `but`."""
    found = {}
    async with engine.connect() as connection:
        for kind, query in CATALOG.items():
            rows = (await connection.execute(text(query), {"schema": schema})).all()
            lines = [str(tuple(row)).replace(f"{schema}.", "") for row in rows]
            found[kind] = sorted(line for line in lines if not line[2:].startswith(but or ("\0",)))
    return found


def own_tree(database: str) -> Config:
    """The configuration of `alembic` in this checkout, for one database."""
    config = Config(ROOT / "alembic.ini")
    config.set_main_option("sqlalchemy.url", database.replace("%", "%%"))
    return config


async def test_head_is_what_the_code_declares(engine: AsyncEngine) -> None:
    """Columns, defaults, checks, indexes and storage options, to the letter; the view is the migrations' alone."""
    await migrate(engine, "migrated")
    async with engine.begin() as connection:
        await connection.run_sync(metadata("declared").create_all)
    declared = await catalog(engine, "declared")
    assert await catalog(engine, "migrated", "outbox_lag", "outbox_version") == declared
    assert {line.split("'")[1] for line in declared["relations"] if "'r'" in line} == TABLES


async def test_alembic_finds_nothing_left_to_generate(engine: AsyncEngine) -> None:
    await migrate(engine, "migrated")
    async with engine.connect() as connection:
        assert await connection.run_sync(_differences) == []


def _differences(connection: Connection) -> list[object]:
    options = {
        "include_schemas": True,
        "include_name": lambda name, kind, _: kind != "schema" or name == "migrated",
        "version_table": "outbox_version",
        "version_table_schema": "migrated",
        "compare_server_default": True,
    }
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), metadata("migrated")))


async def test_tables_survive_a_crash_of_the_server(engine: AsyncEngine) -> None:
    """A9: an unlogged table would come back empty."""
    await migrate(engine)
    async with engine.connect() as connection:
        kinds = await connection.execute(
            text("select relname, relpersistence::text from pg_class where relname ~ '^outbox'")
        )
        assert {persistence for _, persistence in kinds} == {"p"}


def test_up_down_and_up_again_leads_to_the_same(database: str) -> None:
    """Also with rows in the tables; by `alembic` itself, as a developer would."""
    config = own_tree(database)
    command.upgrade(config, "head")
    first = _look(database)
    asyncio.run(_write_one_event(database))
    command.downgrade(config, "base")
    left = _look(database)
    assert [line.split("'")[1] for line in left["relations"]] == ["outbox_version", "outbox_version_pkc"]
    command.upgrade(config, "head")
    assert _look(database) == first


def _look(database: str) -> dict[str, list[str]]:
    async def look() -> dict[str, list[str]]:
        engine = create_async_engine(database, poolclass=NullPool)
        return await catalog(engine, "public")

    return asyncio.run(look())


async def _write_one_event(database: str) -> None:
    engine = create_async_engine(database, poolclass=NullPool)
    manager = SyncManager(engine, [MemorySecondary()])
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Patient", "1", {}))
    await engine.dispose()


async def test_the_printed_sql_applied_by_hand_does_the_same(engine: AsyncEngine) -> None:
    await migrate(engine, "migrated")
    expected = await catalog(engine, "migrated")
    async with engine.begin() as connection:
        await connection.execute(text("create schema printed"))
        raw = await connection.get_raw_connection()
        assert raw.driver_connection is not None
        await raw.driver_connection.execute(migration_sql("printed"))
    assert await catalog(engine, "printed") == expected
    await check_schema(engine, "printed")
    await migrate(engine, "printed")


async def test_migrating_again_changes_nothing(engine: AsyncEngine) -> None:
    await migrate(engine)
    expected = await catalog(engine, "public")
    await migrate(engine)
    assert await catalog(engine, "public") == expected


async def test_an_outbox_in_another_schema_works_without_any_search_path(database: str, engine: AsyncEngine) -> None:
    """Two outboxes live side by side in one database and know nothing of each other."""
    bare = create_async_engine(
        database, poolclass=NullPool, connect_args={"server_settings": {"search_path": "pg_catalog"}}
    )
    for schema, resource_id in (("public", "1"), ("migrated", "2")):
        await migrate(bare, schema)
        await check_schema(bare, schema)
        await _carry(bare, schema, resource_id)
    async with bare.connect() as connection:
        for schema, resource_id in (("public", "1"), ("migrated", "2")):
            ids = await connection.scalars(text(f'select resource_id from "{schema}".outbox'))
            assert ids.all() == [resource_id]
    await bare.dispose()


async def _carry(engine: AsyncEngine, schema: str, resource_id: str) -> None:
    secondary = MemorySecondary()
    manager = SyncManager(engine, [secondary], config=SyncConfig(database_schema=schema, doorbell=False))
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Patient", resource_id, {}))
    assert (await manager.backend_status("memory")).pending == 1
    assert await manager.relay().drain() == 1
    assert set(secondary.held) == {("default", "Patient", resource_id)}
    assert (await manager.backend_status("memory")).pending == 0


async def test_two_migrations_at_once_in_one_process_both_succeed(engine: AsyncEngine) -> None:
    """As two tasks of one program would: concurrent calls wait for each other."""
    await asyncio.gather(migrate(engine), migrate(engine))
    await check_schema(engine)


async def test_migrations_of_many_processes_at_once_all_succeed(database: str, engine: AsyncEngine) -> None:
    """As the instances of an application would that start together."""
    pipe = asyncio.subprocess.PIPE
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MIGRATE, database, stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT
        )
        for _ in range(4)
    ]
    for process in started:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
    ended = await asyncio.gather(*(process.communicate(b"go\n") for process in started))
    assert [errors.decode()[-600:] for _, errors in ended if errors] == []
    assert [process.returncode for process in started] == [0, 0, 0, 0]
    await check_schema(engine)


MIGRATE = """
import asyncio, sys
from sqlalchemy.ext.asyncio import create_async_engine
from outbox.migrate import migrate

async def main():
    engine = create_async_engine(sys.argv[1])
    async with engine.connect():
        print("ready", flush=True)
        sys.stdin.readline()
    await migrate(engine)
    await engine.dispose()

asyncio.run(main())
"""


async def test_a_database_without_tables_is_told_from_one_with_them(engine: AsyncEngine) -> None:
    with pytest.raises(SchemaMissing, match=r"'public' has no outbox tables.*outbox migrate"):
        await check_schema(engine)
    await migrate(engine)
    await check_schema(engine)
    with pytest.raises(SchemaMissing, match="'migrated' has no outbox tables"):
        await check_schema(engine, "migrated")


async def test_tables_of_a_newer_version_are_refused(engine: AsyncEngine) -> None:
    await migrate(engine)
    async with engine.begin() as connection:
        await connection.execute(text("update outbox_version set version_num = '9999_from_the_future'"))
    with pytest.raises(SchemaMissing, match="another version"):
        await check_schema(engine)


APPLICATION_INI = """
[alembic]
script_location = {here}
path_separator = newline
version_locations =
    {here}/versions
    {ours}
outbox_schema = {schema}
sqlalchemy.url = {url}
"""

APPLICATION_ENV = """
from alembic import context
from sqlalchemy import NullPool, create_engine

engine = create_engine(context.config.get_main_option("sqlalchemy.url"), poolclass=NullPool)
with engine.connect() as connection:
    context.configure(connection=connection)
    with context.begin_transaction():
        context.run_migrations()
"""

APPLICATION_REVISION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "a1", None, ("application",), "outbox"

def upgrade():
    op.create_table("patient", sa.Column("id", sa.Text, primary_key=True))

def downgrade():
    op.drop_table("patient")
"""


def _application(directory: Path, database: str, schema: str) -> Config:
    """An application's own alembic tree that takes our migrations in."""
    (directory / "versions").mkdir()
    (directory / "env.py").write_text(APPLICATION_ENV)
    (directory / "versions" / "a1_patient.py").write_text(APPLICATION_REVISION)
    url = database.replace("+asyncpg", "+psycopg").replace("%", "%%")
    ours = migrations_directory() / "versions"
    ini = APPLICATION_INI.format(here=directory, ours=ours, schema=schema, url=url)
    (directory / "alembic.ini").write_text(ini)
    return Config(directory / "alembic.ini")


@pytest.mark.parametrize("schema", ["public", "migrated"])
async def test_an_applications_own_alembic_tree_carries_ours(
    database: str, engine: AsyncEngine, schema: str, tmp_path: Path
) -> None:
    """Both branches go up, one by name and then all, and both go down."""
    await migrate(engine, "declared")
    config = _application(tmp_path, database, schema)
    await asyncio.to_thread(command.upgrade, config, "outbox@head")
    ours = await catalog(engine, schema, "alembic_version")
    assert ours == await catalog(engine, "declared", "outbox_version")
    await asyncio.to_thread(command.upgrade, config, "heads")
    assert any("patient" in line for line in (await catalog(engine, "public"))["relations"])
    await _carry(engine, schema, "1")
    await asyncio.to_thread(command.downgrade, config, "base")
    left = await catalog(engine, "public", "alembic_version")
    assert left["relations"] == []


async def test_a_schema_that_an_application_migrated_is_known_as_there(
    database: str, engine: AsyncEngine, tmp_path: Path
) -> None:
    """The application's version table knows our revision then, and ours does not exist."""
    config = _application(tmp_path, database, "public")
    await asyncio.to_thread(command.upgrade, config, "heads")
    await check_schema(engine)
    # As if the application had not yet taken in a migration that this code needs.
    async with engine.begin() as connection:
        await connection.execute(text("alter table outbox_hold drop column alone"))
    with pytest.raises(SchemaMissing):
        await check_schema(engine)


FROM_THE_WHEEL = """
import outbox
from pathlib import Path
from outbox.migrate import migration_sql, migrations_directory

here = Path.cwd()
assert Path(outbox.__file__).is_relative_to(here), outbox.__file__
assert migrations_directory().is_relative_to(here), migrations_directory()
print(migration_sql("migrated"))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built and installed without any network."""
    wheels, directory = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    _run(["-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], ROOT)
    (wheel,) = wheels.glob("*.whl")
    options = ["--no-deps", "--no-index", "--no-compile", "--quiet", "--target", str(directory)]
    _run(["-m", "pip", "install", *options, str(wheel)], wheels)
    return directory


def _run(arguments: list[str], directory: Path) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=directory, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def test_the_wheel_carries_migrations_and_examples(installed: Path) -> None:
    for ours, theirs in (("migrations", "migrations"), ("examples/fhir", "examples/fhir"), ("outbox", ".")):
        kept = {path.relative_to(ROOT / ours) for path in _files(ROOT / ours)}
        there = {path.relative_to(installed / "outbox" / theirs) for path in _files(installed / "outbox" / theirs)}
        assert kept, ours
        assert kept <= there, ours
    assert (installed / "outbox" / "py.typed").is_file(), "without it the types of the package are invisible"


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts]


def test_migrations_run_from_the_wheel(installed: Path) -> None:
    assert _run(["-c", FROM_THE_WHEEL], installed).strip() == migration_sql("migrated").strip()
