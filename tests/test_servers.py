"""The servers everything else is tested on: they start, survive, come back, never stay behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import psycopg
import pytest
import redis
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.testing.child import ServerFailed, ServerMissing
from outbox.testing.postgres import (
    EmbeddedPostgres,
)
from outbox.testing.process import ask, free_port
from outbox.testing.servers import MariaDBServer, OpenSearchServer, ValkeyServer

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")


def wait_until(condition: Callable[[], bool], within: float = 20) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def connect(server: EmbeddedPostgres) -> psycopg.Connection:
    return psycopg.connect(server.dsn(driver="postgresql"), autocommit=True)


def insert_until_it_dies(server: EmbeddedPostgres, acknowledged: list[int]) -> None:
    with suppress(psycopg.OperationalError), connect(server) as connection:
        while True:
            connection.execute("insert into kept values (%s)", [len(acknowledged)])
            acknowledged.append(len(acknowledged))


@pytest.mark.parametrize("end", [EmbeddedPostgres.stop, EmbeddedPostgres.crash])
def test_postgres_keeps_what_it_acknowledged(end: Callable[[EmbeddedPostgres], None]) -> None:
    with EmbeddedPostgres() as server:
        port = server.port
        with connect(server) as connection:
            assert connection.execute("show fsync").fetchone() == ("on",)
            connection.execute("create table kept (id int)")
        acknowledged: list[int] = []
        writer = threading.Thread(target=insert_until_it_dies, args=(server, acknowledged))
        writer.start()
        wait_until(lambda: len(acknowledged) > 100)
        end(server)
        writer.join()
        assert server.pid is None
        server.start()
        assert server.port == port
        with connect(server) as connection:
            found = {row[0] for row in connection.execute("select id from kept")}
        assert set(acknowledged) <= found


def test_postgres_takes_any_directory_name_and_keeps_a_given_one(directory: Path) -> None:
    data = directory / "with space, a 'quote', a \"double\", 100% $HOME"
    with EmbeddedPostgres(data) as server, connect(server) as connection:
        connection.execute("create table kept as select 7 as id")
    with EmbeddedPostgres(data) as server, connect(server) as connection:
        assert connection.execute("select id from kept").fetchone() == (7,)


def test_second_server_on_a_directory_is_refused_and_the_first_unharmed(directory: Path) -> None:
    with EmbeddedPostgres(directory / "data") as first, connect(first) as connection:
        with pytest.raises(ServerFailed, match=str(first.pid)):
            EmbeddedPostgres(directory / "data").start()
        assert connection.execute("select 1").fetchone() == (1,)


def test_failed_start_shows_the_servers_log_and_leaves_nothing() -> None:
    server = EmbeddedPostgres(settings={"shared_buffers": "much"})
    data = server.directory
    with pytest.raises(ServerFailed, match="shared_buffers"):
        server.__enter__()
    assert server.pid is None
    assert not data.exists()


def test_taken_port_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", free_port()))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match=f"port {port}"), ValkeyServer(port=port):
            pass


def test_server_outlives_the_thread_that_started_it() -> None:
    server = ValkeyServer()
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    with closing(server):
        pid = server.pid
        assert pid is not None
        with redis.Redis.from_url(server.url) as client:
            assert client.ping()
        assert server.pid == pid


_START_ALL_AND_WAIT = """
import json, signal, sys
from pathlib import Path
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.servers import OpenSearchServer, ValkeyServer
kinds = (EmbeddedPostgres, OpenSearchServer, ValkeyServer)
servers = [kind(Path(sys.argv[1]) / kind.name).start() for kind in kinds]
print(json.dumps([server.pid for server in servers]), flush=True)
signal.pause()
"""


@linux_only
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_parent_leaves_no_server_behind(directory: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _START_ALL_AND_WAIT, str(directory)]
    root = Path(__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root) as parent:
        assert parent.stdout is not None
        pids = json.loads(parent.stdout.readline())
        family = pids + _processes_in(directory / "postgres")
        assert all(_runs(pid) for pid in family)
        assert len(family) > 2 * len(pids)
        parent.send_signal(how)
    try:
        wait_until(lambda: not any(_runs(pid) for pid in family))
    finally:
        for pid in filter(_runs, pids):
            os.kill(pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    """Whether the process is there and more than an entry that nobody collected."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def _processes_in(directory: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (entry / "cwd").readlink() == directory:
                found.append(int(entry.name))
    return found


def _json(url: str, body: object = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    method = "GET" if body is None else "PUT"
    request = urllib.request.Request(url, data, headers, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_opensearch_answers_and_forgets_when_killed() -> None:
    with OpenSearchServer() as server:
        url = f"{server.url}/things/_doc/1"
        _json(url, {"name": "kept?"})
        assert _json(url)["_source"] == {"name": "kept?"}
        server.kill()
        assert ask(("127.0.0.1", server.port), b"", timedelta(seconds=1)) == b""
        server.start()
        assert server.url == url.removesuffix("/things/_doc/1")
        assert "things" not in _json(f"{server.url}/_mapping")


@pytest.mark.parametrize("appendonly", [True, False])
def test_valkey_keeps_its_data_when_killed_only_with_appendonly(appendonly: bool) -> None:
    with ValkeyServer(appendonly=appendonly) as server:
        with redis.Redis.from_url(server.url) as client:
            client.set("name", "kept")
        server.kill()
        server.start()
        with redis.Redis.from_url(server.url) as client:
            assert client.get("name") == (b"kept" if appendonly else None)


async def test_mariadb_comes_back_with_its_data() -> None:
    server = MariaDBServer()
    try:
        server.start()
    except ServerMissing as missing:
        pytest.skip(str(missing))
    with closing(server):
        await _mariadb(server.url, "create table kept as select 7 as id")
        server.kill()
        server.start()
        assert await _mariadb(server.url, "select id, @@collation_database from kept") == [(7, "utf8mb4_bin")]


async def _mariadb(url: str, statement: str) -> list[tuple]:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            result = await connection.exec_driver_sql(statement)
            return [tuple(row) for row in result] if result.returns_rows else []
    finally:
        await engine.dispose()


async def test_url_fixtures_yield_servers_that_answer(opensearch_url: str, valkey_url: str) -> None:
    assert _json(opensearch_url)["version"]["number"]
    with redis.Redis.from_url(valkey_url) as client:
        assert client.ping()


def test_database_is_empty_and_of_this_test_alone(database: str) -> None:
    assert database.startswith("postgresql+asyncpg://")
    with psycopg.connect(database.replace("+asyncpg", "")) as connection:
        assert connection.execute("select count(*) from pg_stat_user_tables").fetchone() == (0,)
        assert connection.execute("show server_encoding").fetchone() == ("UTF8",)
