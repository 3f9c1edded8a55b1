"""A SQLite file keeps the contract, and waits its turn."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.errors import SettingsError, Unavailable
from outbox.secondaries.base import Applied, Rejected, Stale
from outbox.secondaries.sql import SqlSecondary
from outbox.testing.contract import SecondaryContract
from outbox.testing.states import CONTENTS, held, seen, write


class TestSqlite(SecondaryContract):
    @pytest.fixture
    async def secondary(self, tmp_path: Path) -> AsyncIterator[SqlSecondary]:
        secondary = SqlSecondary("copy", f"sqlite+aiosqlite:///{tmp_path}/copy.db")
        yield secondary
        await secondary.aclose()


@pytest.fixture
async def copy(tmp_path: Path) -> AsyncIterator[SqlSecondary]:
    copy = SqlSecondary("copy", f"sqlite+aiosqlite:///{tmp_path}/copy.db")
    yield copy
    await copy.aclose()


@pytest.mark.parametrize("name", CONTENTS)
async def test_content_of_gives_back_every_letter(copy: SqlSecondary, name: str):
    await copy.apply([write("p", 1, CONTENTS[name])])
    assert await copy.content_of("Patient", "p", tenant_id="acme") == CONTENTS[name]


async def test_two_processes_worth_of_writers_take_turns(copy: SqlSecondary, tmp_path: Path):
    other = SqlSecondary("copy", f"sqlite+aiosqlite:///{tmp_path}/copy.db")
    names = [f"p{number:02d}" for number in range(60)]
    for step in range(1, 21, 2):
        up, down = [write(name, step) for name in names], [write(name, step + 1) for name in reversed(names)]
        first, second = await asyncio.gather(copy.apply(up), other.apply(down))
        assert list(second) == [Applied()] * 60
        assert set(first) <= {Applied(), Stale()}
        assert await seen(copy) == held(down)
    await other.aclose()


async def test_a_locked_file_is_unavailable(copy: SqlSecondary, tmp_path: Path):
    await copy.apply([write("p", 1)])
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/copy.db", connect_args={"timeout": 0.05})
    impatient = SqlSecondary("copy", engine)
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(Unavailable) as caught:
            await impatient.apply([write("p", 2)])
        assert caught.value.code == "SQLITE_BUSY"
        waiting = asyncio.ensure_future(copy.apply([write("p", 2)]))
        await asyncio.wait({waiting}, timeout=0.2)
        assert not waiting.done()
        other.execute("rollback")
    assert list(await waiting) == [Applied()]
    assert list(await impatient.apply([write("p", 1)])) == [Stale()]
    await engine.dispose()


async def test_a_cancelled_batch_leaves_the_file_unlocked(copy: SqlSecondary, tmp_path: Path):
    began = time.monotonic()
    await copy.apply([write(f"p{number}", 1) for number in range(200)])
    took = time.monotonic() - began
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None, timeout=0)) as other:
        for step in range(40):
            applying = asyncio.ensure_future(copy.apply([write(f"p{number}", 2 + step) for number in range(200)]))
            await asyncio.wait({applying}, timeout=took * step / 40)
            applying.cancel()
            await asyncio.wait({applying})
            other.execute("begin immediate")
            other.execute("rollback")


async def test_rows_that_the_database_refuses_are_rejected_alone(copy: SqlSecondary, tmp_path: Path):
    await copy.apply([write("p", 1)])
    with closing(sqlite3.connect(tmp_path / "copy.db", isolation_level=None)) as other:
        other.execute("create unique index one_of_each on outbox_resources (content)")
    outcomes = await copy.apply([write("q", 9), write("r", 1), write("s", 8)])
    assert [type(outcome) for outcome in outcomes] == [Applied, Rejected, Applied]
    assert "SQLITE_CONSTRAINT_UNIQUE" in outcomes[1].code


async def test_a_missing_directory_is_told_by_its_code(tmp_path: Path):
    copy = SqlSecondary("copy", f"sqlite+aiosqlite:///{tmp_path}/missing/copy.db")
    with pytest.raises(Unavailable) as caught:
        await copy.check()
    assert caught.value.code == "SQLITE_CANTOPEN"
    await copy.aclose()
    # The thread of a connection that never came to be still reports its end to this test's loop.
    async with asyncio.timeout(5):
        while any("_connection_worker_thread" in thread.name for thread in threading.enumerate()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:", "oracle://x", "mssql://x"])
def test_databases_that_could_not_keep_the_promise_are_refused(url: str):
    with pytest.raises(SettingsError, match="engine_or_url"):
        SqlSecondary("copy", url)
