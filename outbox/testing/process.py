"""What all servers we start share: port, directory, readiness, stop, kill, start again."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from outbox.testing.child import Account, Child, ServerFailed, find_account

__all__ = ["ChildServer", "ask", "free_port", "wheel_files"]

# Below the range that kernels hand out to outgoing connections (from 32768 on Linux, 49152 on
# macOS). A port there is not safe while its server is down: any client may be given it, even
# one that keeps dialling that very port, which then talks to itself.
_PORTS = range(20_000, 32_000)
_POLL = 0.02


def free_port() -> int:
    """Return a loopback port that nothing listens on and no outgoing connection will be given."""
    # Not from the seeded generator: parallel test runs would all draw the same numbers.
    for _ in range(100):
        port = secrets.choice(_PORTS)
        if _can_bind(port):
            return port
    raise ServerFailed(f"no free port on 127.0.0.1 from {_PORTS.start} to {_PORTS.stop - 1}")


def ask(address: tuple[str, int] | str, request: bytes, within: timedelta) -> bytes:
    """Return the first bytes a server answers to `request`, none when it does not answer in time.

    The address is (host, port), or the path of a Unix socket.
    """
    deadline = time.monotonic() + within.total_seconds()
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.settimeout(within.total_seconds())
            connection.connect(address)
            connection.sendall(request)
            connection.settimeout(max(deadline - time.monotonic(), 0.001))
            return connection.recv(1024)
    except OSError:
        return b""


def wheel_files(package: str, pattern: str) -> list[Path]:
    """Return the files of an installed package that match, without importing it.

    The packages that carry servers warn, or create users, when they are imported.
    """
    spec = find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return [path for place in places or () for path in sorted(Path(place).glob(pattern))]


class ChildServer(ABC):
    """A server on 127.0.0.1, run as a child of this process. Every call blocks.

    `start` after `stop` or `kill` brings it back on the same port, and on the same data when it
    keeps any. As a context manager it is started, and at the end closed: stopped, and its
    directory removed unless it was given. It ends when this process ends, however that happens,
    SIGKILL included; only then is a temporary directory left behind.
    """

    name: ClassVar[str]
    accounts: ClassVar[tuple[str, ...]] = ()
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    ready_within: timedelta = timedelta(seconds=60)
    stop_within: timedelta = timedelta(seconds=30)

    def __init__(self, directory: Path | None = None, *, port: int | None = None) -> None:
        self._given = directory is not None
        self._directory = directory.absolute() if directory is not None else None
        self._port = port
        self._child: Child | None = None
        self._account: Account | None = None

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1; the same for the life of this object."""
        if self._port is None:
            self._port = free_port()
        return self._port

    @property
    def directory(self) -> Path:
        """Where the server keeps its data and its log, `server.log`."""
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix=f"outbox-{self.name}-"))
        return self._directory

    @property
    def pid(self) -> int | None:
        """The server's process id, None when it is not running."""
        return self._child.pid if self._child is not None and self._child.alive else None

    def start(self) -> Self:
        """Return once the server answers; starting a running server does nothing.

        Raises `ServerMissing` when it is not installed, and `ServerFailed` with the tail of its
        log when it ends at once or does not answer within `ready_within`.
        """
        if self.pid is not None:
            return self
        self.kill()
        self._account = find_account(*self.accounts) if self.accounts else None
        self._own_directory()
        self._prepare()
        if not _can_bind(self.port):
            raise ServerFailed(f"{self.name}: port {self.port} is taken by another process")
        self._child = Child(self._command(), self._account, self._log, self.stop_signal)
        with ExitStack() as failing:
            failing.callback(self.kill)
            self._wait_until_ready()
            failing.pop_all()
        return self

    def stop(self) -> None:
        """Shut the server down in order, or by force after `stop_within`; it can start again."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End the server with SIGKILL, as a crash would; it can start again."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """Stop the server and remove its directory unless it was given; twice is harmless."""
        try:
            self.stop()
        finally:
            if not self._given and self._directory is not None:
                shutil.rmtree(self._directory, ignore_errors=True)
                self._directory = None

    def __enter__(self) -> Self:
        with ExitStack() as failing:
            failing.callback(self.close)
            self.start()
            failing.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abstractmethod
    def _prepare(self) -> None:
        """Create what the server needs in its directory, if it is not there yet."""

    @abstractmethod
    def _command(self) -> Sequence[str | Path]:
        """Return the command that runs the server in the foreground."""

    @abstractmethod
    def _answers(self) -> bool:
        """Say whether the server takes requests now."""

    @property
    def _log(self) -> Path:
        return self.directory / "server.log"

    def _own_directory(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._account is not None and not any(self.directory.iterdir()):
            os.chown(self.directory, self._account.uid, self._account.gid)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.ready_within.total_seconds()
        while not self._answers():
            if self.pid is None:
                raise ServerFailed(f"{self.name} ended while starting:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                late = f"{self.name} did not answer within {self.ready_within.total_seconds():g} s"
                raise ServerFailed(f"{late}:\n{self._log_tail()}")
            time.sleep(_POLL)

    def _log_tail(self) -> str:
        if not self._log.exists():
            return "(no log)"
        return "\n".join(self._log.read_text(errors="replace")[-4000:].splitlines()[-20:])

    def _end(self, how: signal.Signals) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.end(how, self.stop_within)


def _can_bind(port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
