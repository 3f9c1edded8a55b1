"""The commands that bring a secondary in and take it out, as an operator tells them (D7)."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, SyncManager
from outbox.config import manager_from_config
from tests.test_cli import APP, PASSWORD, Refusing, execute, held, outbox, process, write


@pytest.fixture
def dsn(primary: AsyncEngine) -> str:
    """A database with the outbox tables, reached with a password that must never be shown."""
    return primary.url.set(password=primary.url.password or PASSWORD).render_as_string(hide_password=False)


@pytest.fixture
def app(dsn: str, tmp_path: Path) -> Path:
    """A folder with an application, `app.py`, whose secondary is `copy.db`; its rows were there before it."""
    (tmp_path / "app.py").write_text(APP.format(dsn=dsn, copy=tmp_path / "copy.db"))
    execute(dsn, "create table patient (id text primary key, name text not null)")
    execute(dsn, "insert into patient select n::text, 'Ada' from generate_series(1, 250) as n")
    return tmp_path


def status_of(dsn: str) -> list[tuple[str, ...]]:
    return execute(dsn, "select backend_id, status from outbox_secondary order by 1")


def test_a_secondary_is_added_by_one_command_and_taken_out_by_two(app: Path, dsn: str) -> None:
    added = process("add", "copy", "--app", "app:manager", cwd=app)
    assert added.status == 0, added.errors
    assert "copy is registered and shadow" in added.output
    assert "compared 250 resources: 0 differ" in added.output
    assert added.output.endswith("copy equals the primary and is live\n")
    assert len(held(app / "copy.db")) == 250
    assert status_of(dsn) == [("copy", "live")]

    again = process("add", "copy", "--json", "--app", "app:manager", cwd=app)
    assert again.status == 0
    assert again.document["equal"] is True
    assert (again.document["status"], again.document["proof"]["primary_count"]) == ("live", 250)
    assert "copy is registered and live" in again.errors

    drained = process("drain", "copy", "--yes", "--dsn", dsn)
    assert (drained.status, drained.output.splitlines()[-1]) == (0, "copy has it all")
    assert status_of(dsn) == [("copy", "draining")]
    removed = outbox("remove", "copy", "--dsn", dsn)
    assert removed.output == "copy is removed; 0 deliveries were given up\n"
    assert status_of(dsn) == [("copy", "removed")]
    assert len(held(app / "copy.db")) == 250, "what it holds is nobody's to delete"


async def test_what_is_owed_is_given_up_only_when_somebody_says_yes(
    primary: AsyncEngine, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    manager = SyncManager(primary, [MemorySecondary("copy")])
    await manager.register()
    await write(manager, "1", "2", "3")
    refused = outbox("remove", "copy", "--dsn", dsn)
    assert refused.status == 2
    assert "still owed 3 deliveries" in refused.errors
    assert outbox("remove", "copy", "--discard", "--dry-run", "--dsn", dsn).output == "copy is owed 3 deliveries\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    drained = outbox("drain", "copy", "--no-wait", "--dsn", dsn)
    assert (drained.status, "only `outbox add copy` brings it back" in drained.output) == (1, True)
    assert status_of(dsn) == [("copy", "live")]
    assert process("drain", "copy", "--no-wait", "--yes", "--dsn", dsn).status == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\n"))
    assert outbox("remove", "copy", "--discard", "--dsn", dsn).status == 1
    assert status_of(dsn) == [("copy", "draining")]
    done = outbox("remove", "copy", "--discard", "--yes", "--reason", "moved house", "--dsn", dsn)
    assert done.output == "copy is removed; 3 deliveries were given up\n"
    assert execute(dsn, "select distinct reason from outbox_discarded") == [("moved house",)]
    assert outbox("remove", "nobody", "--dsn", dsn).status == 2


async def test_dead_keys_are_told_and_end_the_wait(primary: AsyncEngine, dsn: str) -> None:
    manager = SyncManager(primary, [Refusing("copy")])
    await manager.register()
    await write(manager, "1", "2")
    await manager.relay().drain()
    drained = process("drain", "copy", "--yes", "--dsn", dsn)
    assert (drained.status, drained.output.splitlines()[-1]) == (1, "copy has all it was owed, but 2 dead keys")


def test_an_addition_that_leaves_a_difference_says_so(app: Path, dsn: str) -> None:
    code = (app / "app.py").read_text().replace('SqlSecondary("copy",', 'Strict("copy",')
    (app / "app.py").write_text(code.replace("class Base", f"{STRICT}\nclass Base"))
    added = process("add", "copy", "--app", "app:manager", cwd=app)
    assert added.status == 1, added.errors
    assert "copy is shadow and differs: 0 missing, 0 extra, 0 stale, 0 altered, 1 dead keys\n" in added.output
    assert "outbox failures --backend copy\n" in added.output
    assert added.output.splitlines()[-1].endswith("see to it, and tell it again")
    assert outbox("status", "--dsn", dsn).status == 0, "nobody relies on a shadow"
    promoted = outbox("promote", "copy", "--dsn", dsn)
    assert (promoted.status, promoted.output) == (0, "copy is live\n")
    assert outbox("status", "--dsn", dsn).status == 1


STRICT = """
from outbox import Rejected
from outbox.secondaries.sql import SqlSecondary as Sql

class Strict(Sql):
    async def apply(self, batch):
        rest = await super().apply([each for each in batch if each.resource_id != "7"])
        answers = iter(rest)
        return [Rejected("strict") if each.resource_id == "7" else next(answers) for each in batch]
"""


def test_an_addition_that_differs_with_nothing_dead_names_what_differs(app: Path, dsn: str) -> None:
    """D7: a secondary that says that it applied what it does not hold is told again, and in the end not relied on."""
    code = (app / "app.py").read_text().replace('SqlSecondary("copy",', 'Strict("copy",')
    lossy = STRICT.replace('Rejected("strict")', "Applied()").replace("Rejected", "Applied")
    (app / "app.py").write_text(code.replace("class Base", f"{lossy}\nclass Base"))
    added = process("add", "copy", "--app", "app:manager", cwd=app)
    assert (added.status, status_of(dsn)) == (1, [("copy", "shadow")]), added.errors
    assert "copy is shadow and differs: 1 missing, 0 extra, 0 stale, 0 altered, 0 dead keys\n" in added.output
    (row,) = [line for line in added.output.splitlines() if line.strip().startswith("missing")]
    assert row.split()[-1] == "Patient/7"
    assert "does it drop or change what it says it has applied?" in added.output
    assert "outbox failures" not in added.output


def test_what_cannot_be_rebuilt_is_refused(app: Path) -> None:
    refused = process("rebuild", "copy", "--app", "app:manager", cwd=app)
    assert refused.status == 2
    assert "cannot be rebuilt" in refused.errors


async def test_a_file_may_say_that_a_secondary_comes_as_a_shadow(tmp_path: Path, dsn: str) -> None:
    path = tmp_path / "outbox.toml"
    path.write_text('[secondaries.copy]\ntype = "memory"\nshadow = true\n[secondaries.other]\ntype = "memory"\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUTBOX_DSN", dsn)
        manager = manager_from_config(path)
    await manager.register()
    assert status_of(dsn) == [("copy", "shadow"), ("other", "live")]
    await manager.engine.dispose()
