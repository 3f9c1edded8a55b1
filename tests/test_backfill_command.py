"""`outbox backfill`: what it says, what it leaves behind, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.backfill import MOST_OWED
from tests.relaying import dsn_of
from tests.waiting import eventually

APP = """
import os
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from outbox import SyncManager
from outbox.secondaries.sql import SqlSecondary

class Base(DeclarativeBase): ...

class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[int] = mapped_column(primary_key=True)
    weight: Mapped[float]

manager = SyncManager(create_async_engine(os.environ["DSN"]), [SqlSecondary("copy", "sqlite+aiosqlite:///copy.db")])
manager.track(Patient)
nobody = SyncManager(create_async_engine(os.environ["DSN"]))
"""


class App:
    """A folder with an application, and a database with three patients of whom nobody was told."""

    def __init__(self, path: Path, dsn: str) -> None:
        self.path = path
        self.dsn = dsn
        (path / "app.py").write_text(APP)
        self.execute("create table patient (id integer primary key, weight double precision not null)")
        self.execute("insert into patient select number, number from generate_series(1, 3) as number")
        self.execute("insert into outbox_secondary (backend_id) values ('copy')")

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.dsn.replace("+asyncpg", ""), autocommit=True) as connection:
            found = connection.execute(statement.encode())
            return found.fetchall() if found.description else []

    def recorded(self) -> int:
        ((number,),) = self.execute("select count(*) from outbox")
        return int(number)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-m", "outbox.cli", *arguments, "--app", "app:manager"]

    def environment(self) -> dict[str, str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
        return ours | {"DSN": self.dsn}

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.path,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        pipe = subprocess.PIPE
        running = subprocess.Popen(
            self.command(*arguments), cwd=self.path, env=self.environment(), stdout=pipe, stderr=pipe, text=True
        )
        try:
            yield running
        finally:
            running.kill()
            running.communicate()


@pytest.fixture
def app(primary: AsyncEngine, tmp_path: Path) -> App:
    return App(tmp_path, dsn_of(primary))


def test_it_says_how_many_it_would_record_and_then_records_them(app: App) -> None:
    planned = app.run("backfill", "copy", "--dry-run")
    assert (planned.returncode, planned.stdout) == (0, "3 of 3 resources to record\n")
    assert app.recorded() == 0
    done = app.run("backfill", "copy")
    assert done.returncode == 0, done.stderr
    assert "3 of 3" in done.stdout
    assert "recorded 3 resources for copy" in done.stdout
    assert app.recorded() == 3
    again = app.run("backfill", "copy", "--json", "--restart", "--rate", "1000")
    document = json.loads(again.stdout)
    assert (document["recorded"], document["finished"], document["left"], app.recorded()) == (3, True, 0, 6)


def test_a_row_that_cannot_be_delivered_is_named_and_is_exit_status_1(app: App) -> None:
    app.execute("insert into patient values (4, 'nan')")
    done = app.run("backfill", "copy")
    assert done.returncode == 1
    assert "1 cannot be delivered exactly" in done.stdout
    assert "Patient 4: content.weight" in done.stdout
    assert app.recorded() == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nobody",), "the registry does not have it"),
        (("copy", "--type", "Ward"), "--type Ward: is not tracked"),
    ],
)
def test_what_it_cannot_do_is_exit_status_2(app: App, arguments: tuple[str, ...], words: str) -> None:
    done = app.run("backfill", *arguments)
    assert done.returncode == 2
    assert words in done.stderr


async def test_ctrl_c_ends_it_and_told_again_it_goes_on(app: App) -> None:
    """K4: with no relay it waits for ever; then it is stopped, and another time a relay is there."""
    app.execute("insert into patient select number, 0 from generate_series(4, 900) as number")
    with app.started("backfill", "copy") as running:
        await eventually(lambda: running.poll() is not None or app.recorded() == MOST_OWED)
        assert running.poll() is None, running.communicate()
        running.send_signal(signal.SIGINT)
        _, errors = running.communicate(timeout=30)
        assert running.returncode == 130
    assert "outbox backfill copy goes on where it was" in errors
    with app.started("relay"):
        done = app.run("backfill", "copy", "--json")
    assert json.loads(done.stdout)["recorded"] == app.recorded() == 900
