"""The pytest plugin, in a pytest of its own as a user's would be; and what it costs those who do not use it."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from outbox.testing.postgres import PostgresServer
from tests.test_docs import blocks

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.timeout(600)

INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
addopts = -p no:cacheprovider -p no:randomly
filterwarnings =
    error
    ignore::platformdirs.api.RuntimeDirWarning
"""
CONFTEST = 'pytest_plugins = ["outbox.testing.plugin"]\n'

FIXTURES = '''
import asyncio

import pytest
from sqlalchemy import text

from outbox import MemorySecondary, Retry, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.testing.relay import Failed, StillOwed, quick_config

SEEN = []


def test_fixtures_need_no_event_loop(outbox_dsn, outbox_engine, failure_lab):
    assert outbox_dsn.startswith("postgresql+asyncpg://")

    async def tables():
        async with outbox_engine.connect() as connection:
            return (await connection.execute(text("select count(*) from outbox"))).scalar()

    assert asyncio.run(tables()) == asyncio.run(tables()) == 0


@pytest.mark.parametrize("number", [1, 2])
async def test_every_test_has_a_database_of_its_own(number, outbox_dsn, outbox_engine, outbox_postgres):
    assert outbox_dsn not in SEEN
    SEEN.append(outbox_dsn)
    async with outbox_engine.begin() as connection:
        names = (await connection.execute(text("select datname from pg_database"))).scalars().all()
        assert [name for name in names if any(dsn.endswith(name) for dsn in SEEN)] == [outbox_dsn.rpartition("/")[2]]
        await connection.execute(text("create table mine (id int)"))


class Sometimes(MemorySecondary):
    """Fails in some way so many times."""

    def __init__(self, fails, times):
        super().__init__("index")
        self.fails, self.times = fails, times

    async def apply(self, batch):
        self.times -= 1
        return await super().apply(batch) if self.times < 0 else self.fails(batch)


def unavailable(batch):
    raise Unavailable("refused", "nobody")


def retrying(batch):
    return [Retry("busy") for _ in batch]


async def managed(engine, secondary):
    manager = SyncManager(engine, [secondary], config=quick_config(doorbell=False))
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(SyncEvent.create("Thing", "1", {"n": 1}))
    return manager, session.token


@pytest.mark.parametrize(("fails", "times"), [(unavailable, 5), (retrying, 5), (None, 0)])
async def test_until_idle_waits_for_breakers_and_retries(outbox_engine, outbox_relay, fails, times):
    manager, _ = await managed(outbox_engine, secondary := Sometimes(fails, times))
    assert await outbox_relay(manager).until_idle() == []
    assert secondary.content_of("Thing", "1") == '{"n":1}'
    assert await outbox_relay(manager).until_idle() == []


async def test_what_is_dead_is_an_error_unless_it_may_be(outbox_engine, outbox_relay):
    manager, _ = await managed(outbox_engine, Sometimes(retrying, 1_000))
    relay = outbox_relay(manager)
    with pytest.raises(Failed, match=r"^index: default/Thing/1 is dead \\(busy\\) after attempts: 12$"):
        await relay.until_idle()
    [dead] = await relay.until_idle(may_fail=True)
    assert (dead.resource_id, dead.state) == ("1", "dead")


async def test_what_stays_unavailable_is_still_owed(outbox_engine, outbox_relay):
    manager, _ = await managed(outbox_engine, Sometimes(unavailable, 10**9))
    with pytest.raises(StillOwed, match=r"^after 0.5 s still owed: 1 to index \\(breaker .*, last error refused\\)$"):
        await outbox_relay(manager).until_idle(timeout=0.5)


async def test_what_is_paused_is_not_waited_for(outbox_engine, outbox_relay):
    manager, _ = await managed(outbox_engine, secondary := MemorySecondary("index"))
    await manager.pause("index")
    assert await outbox_relay(manager).until_idle() == []
    assert not secondary.held


async def test_running_carries_beside_and_ends_with_the_block(outbox_engine, outbox_relay):
    manager, token = await managed(outbox_engine, MemorySecondary("index"))
    before = asyncio.all_tasks()
    with pytest.raises(ZeroDivisionError):
        async with outbox_relay(manager).running():
            assert await manager.wait_for_sync(token, timeout=60)
            1 / 0
    await manager.aclose()
    assert asyncio.all_tasks() == before


async def test_connected_is_used_and_let_go(outbox_engine, outbox_relay):
    manager, _ = await managed(outbox_engine, MemorySecondary("index"))
    relay = outbox_relay(manager)
    async with relay.connected():
        assert await relay.until_idle() == await relay.until_idle() == []
    assert await relay.until_idle() == []


async def test_the_failure_lab(failure_lab):
    assert await failure_lab.check(MemorySecondary("index"), only={"woken too late"}) == ["woken too late"]
'''

CONTRACT = """
import pytest

from outbox import MemorySecondary
from outbox.testing.contract import SecondaryContract


class Empty(MemorySecondary):
    async def scan(self, tenant_id, resource_type, after=None):
        for nothing in ():
            yield nothing


class TestEmpty(SecondaryContract):
    @pytest.fixture
    def secondary(self):
        return Empty("index")
"""

QUIET = """
import sys

def test_nothing_of_outbox_is_here():
    assert not [name for name in sys.modules if name == "outbox" or name.startswith("outbox.")]
"""


@pytest.fixture
def project(pytester: pytest.Pytester, postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A user's project that uses the plugin, on the server that is there already."""
    monkeypatch.setenv("OUTBOX_TEST_DSN", postgres.dsn())
    pytester.makefile(".ini", pytest=INI)
    pytester.makeconftest(CONFTEST)
    return pytester


def test_the_fixtures_do_what_they_say(project: pytest.Pytester) -> None:
    project.makepyfile(test_fixtures=FIXTURES)
    result = project.runpytest_subprocess()
    result.assert_outcomes(passed=12)


def test_the_server_of_the_session_is_our_own_where_none_is_named(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_TEST_DSN")
    monkeypatch.setenv("OUTBOX_TEST_PG", "embedded")
    project.makepyfile("def test_it(outbox_postgres, outbox_dsn): assert outbox_postgres.kind == 'embedded'")
    project.runpytest_subprocess().assert_outcomes(passed=1)


def test_without_a_server_tests_fail_and_are_not_skipped(
    project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_TEST_DSN", "postgresql+asyncpg://nobody@127.0.0.1:1/nowhere")
    project.makepyfile("def test_it(outbox_dsn): pass")
    result = project.runpytest_subprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ServerFailed: PostgreSQL at 127.0.0.1:1 refused us*"])


def test_the_suite_shows_what_it_compared(project: pytest.Pytester) -> None:
    project.makepyfile(test_mine=CONTRACT)
    result = project.runpytest_subprocess("-k", "test_late_delete_after_write")
    assert result.parseoutcomes()["failed"] == 1
    result.stdout.fnmatch_lines(["E *Right contains one more item: ResourceDigest(resource_id='p', position=2,*"])


def test_whoever_does_not_ask_for_the_plugin_does_not_load_outbox(pytester: pytest.Pytester) -> None:
    assert not [each for each in entry_points(group="pytest11") if each.value.startswith("outbox")]
    pytester.makefile(".ini", pytest=INI)
    pytester.makepyfile(QUIET)
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_neither_outbox_nor_the_lab_nor_the_relay_needs_pytest() -> None:
    code = "import sys, outbox, outbox.testing.lab, outbox.testing.relay; sys.exit('pytest' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_testing_page_s_code_runs(project: pytest.Pytester, valkey_url: str) -> None:
    """Every example of the page is one module of tests; `valkey_url` says that there is a Valkey to kill."""
    plugin, *examples = blocks("docs/testing.md", "python")
    assert plugin == CONFTEST
    project.makepyfile(test_page="\n".join(["from outbox import MemorySecondary as MySecondary", *examples]))
    result = project.runpytest_subprocess("-W", "ignore:The .*:DeprecationWarning")
    outcomes = result.parseoutcomes()
    assert set(outcomes) == {"passed"}, result.stdout.str()
    assert outcomes["passed"] > 40
    result.stdout.no_fnmatch_line("*skipped*")
