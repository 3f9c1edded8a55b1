"""The command line on a real PostgreSQL: as a process of its own where that matters, else in a thread of this one."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Rejected, SettingsError, SyncConfig, SyncEvent, SyncManager, Unavailable
from outbox.cli import main
from outbox.config import manager_from_config
from outbox.secondaries.base import Outcome
from outbox.secondaries.memory import MemorySecondary
from tests.relaying import value
from tests.waiting import eventually

PASSWORD = "sesame-9f3"
COMMAND = [sys.executable, "-P", "-m", "outbox.cli"]

APP = """
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from outbox import SyncManager
from outbox.secondaries.sql import SqlSecondary

class Base(DeclarativeBase): ...

class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]

manager = SyncManager(create_async_engine("{dsn}"), [SqlSecondary("copy", "sqlite+aiosqlite:///{copy}")])
manager.track(Patient, resource_id=Patient.id)
nobody = SyncManager(create_async_engine("{dsn}"))
"""

SCHEMA = """
select 'column', table_name || '.' || column_name,
       concat_ws(' ', data_type, is_nullable, column_default, is_identity, collation_name)
from information_schema.columns where table_schema = %(schema)s
union all
select 'constraint', conrelid::regclass::text || '.' || conname, pg_get_constraintdef(oid)
from pg_constraint where connamespace = cast(%(schema)s as regnamespace)
union all
select 'index', indexname, indexdef from pg_indexes where schemaname = %(schema)s
union all
select 'view', viewname, definition from pg_views where schemaname = %(schema)s
union all
select 'options', relname, array_to_string(reloptions, ',')
from pg_class where relnamespace = cast(%(schema)s as regnamespace) and reloptions is not null
"""


class Refusing(MemorySecondary):
    """Takes nothing: every event is dead at once."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        return [Rejected("refused", "this one never") for _ in batch]


class Down(MemorySecondary):
    """Cannot be reached."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        raise Unavailable("down", "on purpose")


@pytest.fixture
def dsn(primary: AsyncEngine) -> str:
    """A database with the outbox tables, reached with a password that must never be shown."""
    return primary.url.set(password=primary.url.password or PASSWORD).render_as_string(hide_password=False)


@pytest.fixture
def app(dsn: str, tmp_path: Path) -> Path:
    """A folder with an application, `app.py`, whose secondary is `copy.db`."""
    (tmp_path / "app.py").write_text(APP.format(dsn=dsn, copy=tmp_path / "copy.db"))
    execute(dsn, "create table patient (id text primary key, name text not null)")
    return tmp_path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A file that describes a relay to `copy.db`; the primary is named by the environment."""
    path = tmp_path / "outbox.toml"
    path.write_text('[secondaries.copy]\ntype = "sql"\nurl = "sqlite+aiosqlite:///${COPY}"\nrole = "archive"\n')
    return path


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return {**ours, **variables}


class Done(NamedTuple):
    """What a command left behind."""

    status: int
    output: str
    errors: str

    @property
    def document(self) -> Any:
        return json.loads(self.output)


def outbox(*arguments: str | Path, **variables: str) -> Done:
    """Run a command in this process, which saves it a second of imports. Whatever it does, it shows no password."""
    with ThreadPoolExecutor(1) as thread:
        # In a thread, because some tests sit in a running loop.
        done = thread.submit(_run, [str(each) for each in arguments], variables).result()
    assert PASSWORD not in done.output + done.errors
    return done


def _run(arguments: list[str], variables: Mapping[str, str]) -> Done:
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.setattr(sys, "argv", ["outbox", *arguments])
        patch.setattr(os, "environ", environment(variables))
        try:
            main()
        except SystemExit as end:
            status = end.code
        else:
            status = 0
    assert isinstance(status, int)
    return Done(status, output.getvalue(), errors.getvalue())


def process(*arguments: str | Path, cwd: Path | None = None, **variables: str) -> Done:
    """Run a command as a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment(variables), capture_output=True, text=True, timeout=100, check=False
    )
    assert PASSWORD not in done.stdout + done.stderr
    return Done(done.returncode, done.stdout, done.stderr)


@contextmanager
def started(log: Path, *arguments: str | Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command beside the test, its errors in `log`; at the end it is no more, whatever happened."""
    with log.open("wb") as output:
        process = subprocess.Popen([*COMMAND, *map(str, arguments)], env=environment(variables), stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def execute(dsn: str, statement: str, parameters: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
    plain = make_url(dsn).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        found = connection.execute(statement, parameters)
        return found.fetchall() if found.description else []


def schema_of(dsn: str, schema: str) -> set[tuple[str, ...]]:
    rows = execute(dsn, SCHEMA, {"schema": schema})
    return {tuple(re.sub(rf"\b{schema}\b", "S", str(value)) for value in row) for row in rows}


def held(copy: Path) -> dict[str, str]:
    """What `copy.db` holds, by resource id."""
    if not copy.exists():
        return {}
    with closing(sqlite3.connect(copy)) as connection:
        if not connection.execute("select 1 from sqlite_master where name = 'outbox_resources'").fetchall():
            return {}
        return dict(connection.execute("select resource_id, content from outbox_resources"))


async def write(manager: SyncManager, *resource_ids: str) -> None:
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Patient", each, {"id": each}) for each in resource_ids)


class TestMigrate:
    def test_says_what_it_did_and_what_it_had_not_to_do(self, database: str):
        first, second = (outbox("migrate", OUTBOX_DSN=database) for _ in range(2))
        assert (first.status, second.status) == (0, 0)
        assert "created the outbox tables" in first.output
        assert "nothing to do" in second.output
        assert make_url(database).database in first.output

    def test_prints_sql_that_makes_the_same_tables(self, database: str):
        execute(database, "create schema migrated")
        execute(database, "create schema printed")
        assert outbox("migrate", "--dsn", database, "--schema", "migrated").status == 0

        printed = outbox("migrate", "--sql", "--schema", "printed")
        assert printed.status == 0
        execute(database, printed.output)

        assert schema_of(database, "printed") == schema_of(database, "migrated")
        assert len(schema_of(database, "printed")) > 70
        assert outbox("migrate", "--dsn", database, "--schema", "printed").output.count("nothing to do") == 1

    def test_prints_sql_without_any_address(self):
        assert "create view" in outbox("migrate", "--sql").output
        refused = outbox("migrate", "--sql", "--schema", 'x"; drop')
        assert (refused.status, refused.output) == (2, "")


class TestStatus:
    async def test_json_has_seconds_and_instants(self, primary: AsyncEngine, dsn: str):
        manager = SyncManager(primary, [MemorySecondary("copy")])
        await manager.register()
        await write(manager, "1")
        await manager.relay().drain()
        await write(manager, "2")

        done = outbox("status", "--json", OUTBOX_DSN=dsn)

        assert done.status == 0, done.errors
        document = done.document
        [copy] = document.pop("secondaries")
        assert document == {"ok": True, "max_lag": 30.0, "reasons": []}
        assert (copy["backend_id"], copy["status"], copy["breaker"]) == ("copy", "live", "closed")
        assert (copy["pending"], copy["applied"], copy["failing"], copy["dead"]) == (1, 1, 0, 0)
        assert (copy["healthy"], copy["reasons"]) == (True, [])
        assert 0 < copy["lag"] < 60
        assert datetime.fromisoformat(copy["last_success_at"]).utcoffset() == timedelta(0)
        assert copy["last_error_at"] is None

    async def test_a_lag_above_the_objective_is_status_1(self, primary: AsyncEngine, dsn: str):
        manager = SyncManager(primary, [MemorySecondary("copy")])
        await manager.register()
        assert outbox("status", "--max-lag", "0", "--dsn", dsn).status == 0
        await write(manager, "1")

        late = outbox("status", "--max-lag", "0", "--json", "--dsn", dsn)
        assert (late.status, late.document["ok"]) == (1, False)
        [reason] = late.document["secondaries"][0]["reasons"]
        assert re.fullmatch(r"lag \d+\.\d s is above 0\.0 s", reason)
        # Who is paused is meant to lag.
        execute(dsn, "update outbox_secondary set status = 'paused'")
        assert outbox("status", "--max-lag", "0", "--dsn", dsn).status == 0

    async def test_a_dead_key_is_status_1(self, primary: AsyncEngine, dsn: str):
        manager = SyncManager(primary, [Refusing("copy")])
        await manager.register()
        await write(manager, "1")
        await manager.relay().drain()
        done = outbox("status", "--json", "--dsn", dsn)
        assert done.status == 1
        assert done.document["secondaries"][0]["reasons"] == ["dead keys: 1"]

    async def test_an_open_breaker_is_status_1(self, primary: AsyncEngine, dsn: str):
        manager = SyncManager(primary, [Down("copy")])
        await manager.register()
        await write(manager, "1")
        relay = manager.relay()

        async def opened() -> bool:
            await relay.run_once("copy")
            return (await manager.backend_status("copy")).breaker == "open"

        await eventually(opened)
        done = outbox("status", "--json", "--dsn", dsn)
        assert done.status == 1
        assert done.document["secondaries"][0]["reasons"] == ["breaker open", "attempts: the last 3 failed (down)"]

    async def test_people_get_a_table(self, primary: AsyncEngine, dsn: str):
        assert "No secondary is registered" in outbox("status", "--dsn", dsn).output
        await SyncManager(primary, [MemorySecondary("copy")]).register()
        lines = outbox("status", "--dsn", dsn).output.split("\n")
        assert any({"secondary", "pending", "lag", "breaker"} <= set(line.split()) for line in lines)
        assert any(line.split()[:2] == ["copy", "live"] for line in lines)


class TestFailures:
    async def test_lists_them_for_people_and_programs(self, primary: AsyncEngine, dsn: str):
        manager = SyncManager(primary, [Refusing("copy"), MemorySecondary("other")])
        await manager.register()
        assert "Nothing fails" in outbox("failures", "--dsn", dsn).output
        await write(manager, "[bold]1")
        await manager.relay().drain()

        table = outbox("failures", "--dsn", dsn)
        assert "Patient/[bold]1" in table.output
        assert "refused: this one never" in table.output
        [failure] = outbox("failures", "--json", "--dsn", dsn).document["failures"]
        assert outbox("failures", "list", "--json", "--dsn", dsn).document == {"failures": [failure]}
        assert (failure["backend_id"], failure["state"], failure["attempts"]) == ("copy", "dead", 1)
        assert datetime.fromisoformat(failure["first_failed_at"]).tzinfo is not None
        assert outbox("failures", "--json", "--backend", "other", "--dsn", dsn).document == {"failures": []}

        unknown = outbox("failures", "--backend", "nobody", "--dsn", dsn)
        assert unknown.status == 2
        assert "copy, other" in unknown.errors

    async def test_tries_them_again_and_gives_them_up(self, primary: AsyncEngine, dsn: str):
        """U16, D4: a dry run changes nothing and says how many."""
        manager = SyncManager(primary, [Refusing("copy")])
        await manager.register()
        await write(manager, "1", "2", "3")
        await manager.relay().drain()
        dead = "select count(*) from outbox_hold where state = 'dead'"

        assert outbox("failures", "redrive", "--id", "1", "--dry-run", "--dsn", dsn).output == (
            "1 key would be tried again\n"
        )
        assert execute(dsn, dead) == [(3,)]
        assert "1 key due now" in outbox("failures", "redrive", "--id", "1", "--dsn", dsn).output
        assert execute(dsn, dead) == [(2,)]
        missing = outbox("failures", "discard", "--dsn", dsn)
        assert (missing.status, "--reason" in missing.errors) == (2, True)
        reason = ("--reason", "moved away", "--id", "2", "--dsn", dsn)
        assert outbox("failures", "discard", "--dry-run", *reason).output == "1 key would be given up\n"
        assert outbox("failures", "discard", "--yes", *reason).output == "1 key given up\n"
        assert execute(dsn, "select resource_id, reason from outbox_discarded") == [("2", "moved away")]
        assert "must be retrying or dead" in outbox("failures", "redrive", "--state", "odd", "--dsn", dsn).errors
        for command in ("redrive", "discard"):
            unknown = outbox("failures", command, "--backend", "nobody", "--reason", "x", "--dsn", dsn)
            assert unknown.status == 2


class TestPause:
    async def test_stops_and_goes_on(self, primary: AsyncEngine, dsn: str):
        """D52: and status shows it."""
        manager = SyncManager(primary, [MemorySecondary("copy")])
        await manager.register()
        assert "outbox resume copy" in outbox("pause", "copy", "--dsn", dsn).output
        assert execute(dsn, "select status from outbox_secondary") == [("paused",)]
        assert " paused " in outbox("status", "--dsn", dsn).output
        assert outbox("resume", "copy", "--dsn", dsn).output == "copy is live\n"
        assert execute(dsn, "select status from outbox_secondary") == [("live",)]
        unknown = outbox("pause", "nobody", "--dsn", dsn)
        assert (unknown.status, "copy" in unknown.errors) == (2, True)


class TestRelay:
    @pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
    async def test_carries_until_a_signal_and_ends_well(
        self, primary: AsyncEngine, dsn: str, config: Path, tmp_path: Path, how: signal.Signals
    ):
        log = tmp_path / "relay.log"
        with started(log, "relay", "--config", config, OUTBOX_DSN=dsn, COPY=str(tmp_path / "copy.db")) as relay:
            await eventually(lambda: relay.poll() is not None or execute(dsn, "select 1 from outbox_secondary"))
            assert relay.poll() is None, log.read_text()
            await write(SyncManager(primary), "1", "2")
            await eventually(lambda: held(tmp_path / "copy.db") == {"1": '{"id":"1"}', "2": '{"id":"2"}'})
            relay.send_signal(how)
            assert relay.wait(timeout=20) == 0
        first, last = log.read_text().splitlines()
        url = primary.url
        assert re.search(rf"relay [0-9a-f-]{{36}} carries from {url.host}:{url.port}/{url.database} to copy$", first)
        assert re.search(r"relay [0-9a-f-]{36} stopped", last)
        assert PASSWORD not in first + last
        assert execute(dsn, "select backend_id, role, ordering from outbox_secondary") == [("copy", "archive", "state")]
        assert execute(dsn, "select count(*) from outbox_attempt where finished_at is null") == [(0,)]

    async def test_drains_and_ends(self, primary: AsyncEngine, dsn: str, app: Path):
        assert process("relay", "--drain", "--app", "app:manager", cwd=app).status == 0
        await write(SyncManager(primary), *map(str, range(250)))

        done = process("relay", "--drain", "--app", "app:manager", cwd=app)

        assert done.status == 0, done.errors
        assert "250 deliveries carried" in done.errors
        assert len(held(app / "copy.db")) == 250
        # Where there is no other relay nobody else tidies up.
        assert await value(primary, "select applied from outbox_secondary") == 250


class TestReconcile:
    def test_finds_repairs_and_proves(self, dsn: str, app: Path):
        process("relay", "--drain", "--app", "app:manager", cwd=app)
        # Written past every session, so no event tells of it.
        execute(dsn, "insert into patient values ('1', 'Ada'), ('2', 'Bob')")

        found = process("reconcile", "copy", "--app", "app:manager", cwd=app)
        assert found.status == 1
        assert "copy: 2 missing, 0 extra, 0 stale, 0 altered" in found.output
        assert "Patient/1" in found.output
        assert held(app / "copy.db") == {}

        repaired = process("reconcile", "copy", "--repair", "--json", "--app", "app:manager", cwd=app)
        assert repaired.status == 0
        document = repaired.document
        assert (document["missing"], document["repaired"], len(document["samples"])) == (2, 2, 2)
        assert document["duration"] > 0

        process("relay", "--drain", "--app", "app:manager", cwd=app)
        assert held(app / "copy.db").keys() == {"1", "2"}
        proof = process("reconcile", "copy", "--app", "app:manager", "--type", "Patient", cwd=app)
        assert proof.status == 0
        assert "copy: 0 missing, 0 extra, 0 stale, 0 altered" in proof.output
        assert "compared 2 resources" in proof.output

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            (["copy", "--app", "app:manager", "--type", "Nothing"], "tracked are Patient"),
            (["copy", "--app", "app:nobody"], "tracks no class"),
            (["copy", "--app", "app:manager"], "the registry does not have it"),
            (["other", "--app", "app:manager"], "'other' is unknown"),
        ],
    )
    def test_never_compares_nothing(
        self, app: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
    ):
        monkeypatch.chdir(app)
        monkeypatch.syspath_prepend(app)
        monkeypatch.delitem(sys.modules, "app", raising=False)
        done = outbox("reconcile", *arguments, "--repair")
        assert done.status == 2
        assert problem in done.errors
        assert done.output == ""


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            (["status"], "give --dsn, or OUTBOX_DSN"),
            (["migrate"], "give --dsn, or OUTBOX_DSN"),
            (["status", "--dsn", f"postgresql://a:{PASSWORD}@127.0.0.1:1/db"], "127.0.0.1:1/db does not answer"),
            (["migrate", "--dsn", f"mysql://a:{PASSWORD}@127.0.0.1/db"], "must be of PostgreSQL"),
            (["status", "--dsn", PASSWORD], "is not an address"),
            (["relay"], "no manager is named"),
            (["relay", "--app", "gone:manager"], "there is no module gone in"),
            (["relay", "--app", "json.gone:manager"], "there is no module json.gone in"),
            (["relay", "--app", "json:manager"], "is nothing that is there"),
            (["relay", "--app", "json:loads"], "is of type function, not a SyncManager"),
            (["relay", "--app", "json"], "must be module:attribute"),
            (["relay", "--config", "gone.toml"], "gone.toml cannot be read: No such file"),
        ],
    )
    def test_are_one_sentence_that_says_what_to_do(self, arguments: list[str], hint: str):
        done = outbox(*arguments)
        assert done.status == 2
        assert hint in done.errors
        assert done.errors.startswith("outbox: ")
        assert done.errors.count("\n") == 1
        assert done.output == ""

    @pytest.mark.parametrize("command", ["status", "failures"])
    def test_missing_tables_are_told_with_the_command_that_makes_them(self, database: str, command: str):
        done = outbox(command, OUTBOX_DSN=database)
        assert done.status == 2
        assert "run `outbox migrate`" in done.errors

    def test_a_relay_does_not_wait_for_tables_that_are_missing(self, database: str, config: Path, tmp_path: Path):
        done = process("relay", "--config", config, OUTBOX_DSN=database, COPY=str(tmp_path / "copy.db"))
        assert done.status == 2
        assert "run `outbox migrate`" in done.errors
        assert "Traceback" not in done.errors

    def test_a_database_that_is_not_there_is_named(self, dsn: str):
        done = outbox("status", "--dsn", make_url(dsn).set(database="gone").render_as_string(hide_password=False))
        assert done.status == 2
        assert "/gone has no such database" in done.errors

    def test_debug_shows_where_it_came_from(self):
        done = process("status", OUTBOX_DEBUG="1")
        assert done.status == 2
        assert "Traceback" in done.errors

    def test_what_an_application_misses_is_its_own_error(self, tmp_path: Path):
        (tmp_path / "broken.py").write_text("import not_installed_anywhere")
        done = process("relay", "--app", "broken:manager", cwd=tmp_path)
        assert done.status == 2
        assert 'broken.py", line 1' in done.errors
        assert "not_installed_anywhere" in done.errors

    @pytest.mark.parametrize("package", ["typer", "rich"])
    def test_without_the_extra_it_says_how_to_get_it(self, package: str):
        code = f"import sys; sys.modules[{package!r}] = None; from outbox.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr == "outbox: the command line is an extra: pip install 'outbox-sync[cli]'\n"


class TestConfig:
    async def test_describes_a_whole_manager(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.delenv("OUTBOX_DSN", raising=False)
        monkeypatch.setenv("SECRET", PASSWORD)
        (tmp_path / "outbox.toml").write_text("""
            dsn = "postgres://relay:${SECRET}@db:5433/clinic?sslmode=require"
            [outbox]
            batch_size = 7
            lease = "PT30S"
            [secondaries.search]
            type = "opensearch"
            url = "http://127.0.0.1:9200"
            prefix = "clinic"
            timeout = 5
            resource_types = ["Patient", "Encounter"]
            [secondaries.archive]
            type = "sql"
            url = "postgresql+asyncpg://a:${SECRET}@127.0.0.1/archive"
            schema = "kept"
            role = "archive"
            ordering = "log"
            tenant_ids = ["north"]
            [secondaries.cache]
            type = "valkey"
            url = "redis://127.0.0.1:6379/0"
            tombstones_for = "P1D"
            [secondaries.scratch]
            type = "memory"
        """)
        manager = manager_from_config(tmp_path / "outbox.toml")
        try:
            url = manager.engine.url
            assert (url.drivername, url.password, url.host, url.port) == ("postgresql+asyncpg", PASSWORD, "db", 5433)
            assert url.query == {"ssl": "require"}
            assert (manager.config.batch_size, manager.config.lease) == (7, timedelta(seconds=30))
            found = {each.backend_id: each for each in manager.registrations}
            assert list(found) == ["search", "archive", "cache", "scratch"]
            assert found["search"].resource_types == ["Patient", "Encounter"]
            assert (found["archive"].role, found["archive"].ordering) == ("archive", "log")
            assert (found["archive"].tenant_ids, found["cache"].tenant_ids) == (["north"], None)
            assert found["search"].secondary.search_name("Patient") == "clinic-patient"
        finally:
            await manager.aclose()
            await manager.engine.dispose()

    def test_the_environment_wins_over_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "outbox.toml").write_text('dsn = "postgresql://file/db"')
        monkeypatch.setenv("OUTBOX_DSN", "postgresql://environment/db")
        assert manager_from_config(tmp_path / "outbox.toml").engine.url.host == "environment"

    @pytest.mark.parametrize(("given", "seconds"), [("60", 60), ("0.5", 0.5), ("PT30S", 30), ("00:02:00", 120)])
    def test_durations_of_the_environment_are_seconds_too(
        self, monkeypatch: pytest.MonkeyPatch, given: str, seconds: float
    ):
        monkeypatch.setenv("OUTBOX_STATEMENT_TIMEOUT", given)
        monkeypatch.setenv("OUTBOX_MAX_READ_LAG", given)
        monkeypatch.setenv("OUTBOX_PROOF_INTERVAL", given)
        found = SyncConfig.load()
        durations = (found.statement_timeout, found.max_read_lag, found.proof_interval)
        assert durations == (timedelta(seconds=seconds),) * 3

    def test_a_duration_that_is_none_is_refused(self, monkeypatch: pytest.MonkeyPatch):
        for given in ("soon", "-5", "0", "1e9", ""):
            monkeypatch.setenv("OUTBOX_STATEMENT_TIMEOUT", given)
            with pytest.raises(SettingsError, match="statement_timeout"):
                SyncConfig.load()

    @pytest.mark.parametrize(
        ("text", "field", "expectation"),
        [
            ("", "dsn", "missing"),
            ("dsn = 5", "dsn", "missing"),
            ("dsn = 'postgresql://a:${NOWHERE}@b/c'", "dsn", "NOWHERE"),
            ("= 1", "config", "not TOML"),
            ("dsn = 'postgresql://b/c'\nsecondary = 1", "secondary", "no part"),
            ("dsn = 'postgresql://b/c'\nsecondaries = 1", "secondaries", "table"),
            ("dsn = 'postgresql://b/c'\n[outbox]\nbatch = 1", "batch", "not permitted"),
            ("dsn = 'postgresql://b/c'\noutbox = 3", "outbox", "must be a table"),
            ("dsn = 'postgresql://b/c'\n[secondaries.a]\nurl = 'x'", "secondaries.a.type", "opensearch"),
            ("dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = 'sql'", "secondaries.a.url", "required"),
            ("dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = 'memory'\nurl = 'x'", "secondaries.a.url", "permitted"),
            (
                "dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = 'valkey'\nurl = 'redis://h'\nprefx = 'x'",
                "secondaries.a.prefx",
                "not permitted",
            ),
            (
                "dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = 'valkey'\nurl = 'redis://h'\nordering = 'any'",
                "secondaries.a.ordering",
                "'state' or 'log'",
            ),
            (
                f"dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = 'valkey'\nurl = 'http://a:{PASSWORD}@h'",
                "secondaries.a.url",
                "address of valkey",
            ),
            ("dsn = 'postgresql://b/c'\n[secondaries.'A B']\ntype = 'memory'", "backend_id", "must match"),
        ],
    )
    def test_what_is_wrong_is_named_by_its_field(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, field: str, expectation: str
    ):
        monkeypatch.delenv("OUTBOX_DSN", raising=False)
        (tmp_path / "outbox.toml").write_text(text)
        with pytest.raises(SettingsError, match=re.escape(expectation)) as refused:
            manager_from_config(tmp_path / "outbox.toml")
        assert refused.value.field == field
        assert PASSWORD not in str(refused.value)

    @pytest.mark.parametrize(
        ("kind", "url", "missing", "extra"),
        [
            ("opensearch", "http://h", "opensearchpy", "opensearch"),
            ("elasticsearch", "http://h", "elasticsearch", "elasticsearch"),
            ("valkey", "redis://h", "redis", "valkey"),
            ("sql", "sqlite+aiosqlite:///x.db", "aiosqlite", "sqlite"),
            ("sql", "mysql+asyncmy://h/x", "asyncmy", "mysql"),
            ("sql", "postgresql+psycopg://h/x", "psycopg", "psycopg"),
        ],
    )
    def test_a_missing_package_is_told_with_its_extra(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, url: str, missing: str, extra: str
    ):
        path = tmp_path / "outbox.toml"
        path.write_text(f"dsn = 'postgresql://b/c'\n[secondaries.a]\ntype = '{kind}'\nurl = '{url}'")
        monkeypatch.delitem(sys.modules, "outbox.secondaries.valkey", raising=False)
        for name in [missing, *(each for each in sys.modules if each.startswith(f"{missing}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        done = outbox("relay", "--config", path)
        assert done.status == 2
        assert f"needs {missing}, which is not installed: pip install 'outbox-sync[{extra}]'" in done.errors
