"""What a command is about: what was typed, and only where nothing was, what the environment says."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncManager
from tests.test_cli import APP, PASSWORD, Refusing, execute, outbox, process, write

DEAD = "select resource_id from outbox_hold where state = 'dead' order by 1"
STATUS = "select status from outbox_secondary"


@pytest.fixture
def dsn(primary: AsyncEngine) -> str:
    """A database with the outbox tables, reached with a password that must never be shown."""
    return primary.url.set(password=primary.url.password or PASSWORD).render_as_string(hide_password=False)


@pytest.fixture
def elsewhere(dsn: str) -> str:
    """The address of a database that is not there: whoever goes by it fails."""
    return make_url(dsn).set(database="elsewhere").render_as_string(hide_password=False)


@pytest.fixture
async def refused(primary: AsyncEngine) -> SyncManager:
    """A manager whose one secondary refused one key."""
    manager = SyncManager(primary, [Refusing("copy")])
    await manager.register()
    await write(manager, "1")
    await manager.relay().drain()
    return manager


@pytest.mark.usefixtures("refused")
def test_what_was_typed_wins_over_the_environment(dsn: str, elsewhere: str, tmp_path: Path) -> None:
    """Whoever types the address of a test system must not stop the other one."""
    (tmp_path / "theirs.py").write_text(APP.format(dsn=elsewhere, copy=tmp_path / "copy.db"))
    done = process("pause", "copy", "--dsn", dsn, cwd=tmp_path, OUTBOX_APP="theirs:manager", OUTBOX_DSN=elsewhere)
    assert done.status == 0, done.errors
    assert execute(dsn, STATUS) == [("paused",)]
    done = process("resume", "copy", cwd=tmp_path, OUTBOX_APP="theirs:manager", OUTBOX_DSN=dsn)
    assert "/elsewhere has no such database" in done.errors
    assert outbox("resume", "copy", OUTBOX_DSN=dsn).status == 0


@pytest.mark.parametrize("command", ["status", "pause copy", "why Patient/1", "doctor", "drain copy --yes"])
def test_two_that_were_typed_are_refused(command: str) -> None:
    done = outbox(*command.split(), "--app", "shop:manager", "--dsn", "postgresql://nobody/nothing")
    assert done.status == 2
    assert "--app and --dsn may name different primaries" in done.errors


def test_migrations_go_by_an_address_and_not_by_the_application(dsn: str, elsewhere: str, tmp_path: Path) -> None:
    """The application's own account need not be one that may create tables."""
    (tmp_path / "theirs.py").write_text(APP.format(dsn=elsewhere, copy=tmp_path / "copy.db"))
    done = process("migrate", cwd=tmp_path, OUTBOX_APP="theirs:manager", OUTBOX_DSN=dsn)
    assert (done.status, "nothing to do" in done.output) == (0, True), done.errors


@pytest.mark.parametrize("command", [["doctor"], ["why", "Patient/1"], ["promote", "copy"]])
def test_another_schema_than_the_managers_is_refused(dsn: str, tmp_path: Path, command: list[str]) -> None:
    """It was ignored, so a command looked at one schema and was told another."""
    (tmp_path / "ours.toml").write_text(f'dsn = "{dsn}"\n[outbox]\ndatabase_schema = "public"\n')
    config = ("--config", tmp_path / "ours.toml")
    done = outbox(*command, *config, "--schema", "sync")
    assert (done.status, "--schema sync: this manager's tables are in public" in done.errors) == (2, True), done.errors
    assert "--schema" not in outbox(*command, *config, "--schema", "public").errors


@pytest.mark.usefixtures("refused")
@pytest.mark.parametrize("command", [["discard", "--reason", "x", "--yes"], ["redrive"]])
def test_what_stands_before_the_second_word_is_not_left_out_silently(dsn: str, command: list[str]) -> None:
    """`--backend other` there meant every secondary."""
    for option in (["--backend", "other"], ["--dsn", dsn], ["--most", "5"], ["--json"]):
        done = outbox("failures", *option, *command, OUTBOX_DSN=dsn)
        assert (done.status, f"{option[0]} belongs after `{command[0]}`" in done.errors) == (2, True), done.errors
    assert execute(dsn, DEAD) == [("1",)]
    assert outbox("failures", *command, OUTBOX_DSN=dsn).status == 0
    assert execute(dsn, DEAD) == []


@pytest.mark.usefixtures("refused")
def test_nothing_is_given_up_before_somebody_says_yes(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("failures", "discard", "--reason", "gone", "--dsn", dsn)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    done = outbox(*asked)
    assert (done.status, "1 key would be given up" in done.output) == (1, True)
    assert execute(dsn, DEAD) == [("1",)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert outbox(*asked).output.endswith("1 key given up\n")
    assert execute(dsn, DEAD) == []


async def test_a_list_that_was_cut_says_so(refused: SyncManager, dsn: str) -> None:
    assert "--most" not in outbox("failures", "--dsn", dsn).output
    await write(refused, "2")
    await refused.relay().drain()
    cut = outbox("failures", "--most", "1", "--dsn", dsn).output
    assert cut.endswith("These are the first 1; --most shows more.\n")


def test_what_an_application_fails_with_is_not_taken_for_an_unhealthy_secondary(tmp_path: Path) -> None:
    """1 is the status of what was looked at and found wrong."""
    (tmp_path / "broken.py").write_text("{}['VALKEY_URL']")
    done = process("status", "--app", "broken:manager", cwd=tmp_path)
    assert done.status == 2
    assert 'broken.py", line 1' in done.errors


@pytest.mark.usefixtures("refused")
async def test_a_lock_that_does_not_come_and_a_primary_that_only_reads(primary: AsyncEngine, dsn: str) -> None:
    execute(dsn, f'alter database "{primary.url.database}" set lock_timeout = 100')
    async with primary.connect() as other:
        await other.exec_driver_sql("select from outbox_secondary for update")
        assert "did not give a lock in time" in outbox("pause", "copy", "--dsn", dsn).errors
    execute(dsn, f'alter database "{primary.url.database}" set default_transaction_read_only = on')
    assert "only reads, as a standby does" in outbox("pause", "copy", "--dsn", dsn).errors
