"""One run of a server's command: under the right account, and never longer than we live."""

from __future__ import annotations

import os
import pwd
import select
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from outbox.errors import OutboxError

__all__ = ["Account", "Child", "ServerFailed", "ServerMissing", "find_account", "run_tool"]

# The first read ends when our end of the pipe closes, which even SIGKILL does.
_LIFELINE = """
read -r _
kill -s "$2" "$1" || exit 0
for second in 1 2 3 4 5 6 7 8 9 10; do sleep 1; kill -0 "$1" || exit 0; done
kill -s KILL "$1"
"""


class ServerMissing(OutboxError):
    """A server is not installed; the text says what was looked for and what to install."""


class ServerFailed(OutboxError):
    """A server is installed and did not start or stop; the text ends with what it said itself."""


@dataclass(frozen=True, slots=True)
class Account:
    """The system account a server runs under when we are root."""

    name: str
    uid: int
    gid: int


def find_account(*names: str) -> Account | None:
    """Return the first of the accounts that exists when we are root, else None: we stay who we are.

    Raises `ServerMissing` when we are root and none exists: these servers refuse to run as root.
    """
    if os.geteuid() != 0:
        return None
    for name in names:
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(name, entry.pw_uid, entry.pw_gid)
    raise ServerMissing(f"running as root, and no account to run a server under: {', '.join(names)}")


def run_tool(command: Sequence[str | Path], account: Account | None, within: timedelta) -> str:
    """Run a server's own tool to its end and return what it printed.

    Raises `ServerFailed` with that text when it cannot run, fails, or takes longer than `within`.
    """
    name = Path(command[0]).name
    try:
        done = subprocess.run(  # noqa: S603 - a command we composed, no shell
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",
            env=_environment(),
            user=account.uid if account else None,
            group=account.gid if account else None,
            extra_groups=[] if account else None,
            timeout=within.total_seconds(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerFailed(f"{name} did not run: {error}") from error
    text = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        raise ServerFailed(f"{name} ended with {done.returncode}:\n{text[-2000:]}")
    return text


class Child:
    """A running command and the lifeline that ends it when this process does not live to do so.

    It runs in a session of its own, so Ctrl-C does not reach it, with its output appended to `log`.
    Raises `ServerFailed` when the command cannot be run.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        account: Account | None,
        log: Path,
        stop_signal: signal.Signals,
    ) -> None:
        # Every descendant inherits the writing end: end-of-file says that the last of them is gone.
        self._descendants, inherited = os.pipe()
        try:
            with log.open("ab") as output:
                self._process = subprocess.Popen(  # noqa: S603 - a command we composed, no shell
                    [str(part) for part in command],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd="/",
                    env=_environment(),
                    user=account.uid if account else None,
                    group=account.gid if account else None,
                    extra_groups=[] if account else None,
                    pass_fds=[inherited],
                    start_new_session=True,
                )
        except OSError as error:
            os.close(self._descendants)
            raise ServerFailed(f"{Path(command[0]).name} did not run: {error}") from error
        finally:
            os.close(inherited)
        self._lifeline = _lifeline(self._process.pid, stop_signal)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the command still runs."""
        return self._process.poll() is None

    def end(self, how: signal.Signals, within: timedelta) -> None:
        """Send the signal and return when the command and all its descendants are gone.

        Kills what does not go `within`; raises `ServerFailed` when a descendant outlives even that.
        """
        try:
            self._process.send_signal(how)
            if not self._gone(within):
                self._process.kill()
                if not self._gone(within):
                    raise ServerFailed(f"descendants of process {self.pid} survived its end")
        finally:
            self._process.wait()
            os.close(self._descendants)
            self._cut_lifeline()

    def _gone(self, within: timedelta) -> bool:
        poll = select.poll()
        poll.register(self._descendants, select.POLLIN | select.POLLHUP)
        return bool(poll.poll(within.total_seconds() * 1000))

    def _cut_lifeline(self) -> None:
        self._lifeline.kill()
        assert self._lifeline.stdin is not None
        self._lifeline.stdin.close()
        self._lifeline.wait()


def _lifeline(pid: int, how: signal.Signals) -> subprocess.Popen[bytes]:
    """Start the shell that ends `pid` once this process is gone, in order first and then by force.

    Linux's parent-death signal is not used: it fires when the mere thread that forked ends, has to
    be set by code between fork and exec, and exists nowhere else.
    """
    return subprocess.Popen(  # noqa: S603 - a constant script; its arguments are a number and a name
        ["/bin/sh", "-c", _LIFELINE, "lifeline", str(pid), how.name.removeprefix("SIG")],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )


def _environment() -> dict[str, str]:
    """A server's behaviour must not depend on our user's PGDATA, locale or time zone."""
    return {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
