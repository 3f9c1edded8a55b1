"""Nursery: one warmed-up process that forks all others, so that starting one costs milliseconds and not a second.

It alone sends them signals and it alone reaps them, so that no signal can reach a process that has the number of one
that is gone. As a program it is that process.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import msgspec

from outbox.testing.crash.roles import live
from outbox.testing.crash.terms import Terms, engine_of

__all__ = ["Nursery", "main"]

_TICK = 0.01
_TO_SAY = 0.5


class Nursery:
    """The harness's side: starts, signals and misses processes by name."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._living: dict[str, asyncio.Future[int]] = {}
        self.ended: list[tuple[str, int]] = []
        self.stuck: list[str] = []
        """Who did not end when told to."""

    def living(self, role: str) -> list[str]:
        """The names of the processes of a role that were started and have not ended."""
        return [name for name in self._living if name.startswith(f"{role}-") and self.lives(name)]

    def lives(self, name: str) -> bool:
        """Whether a process was started and has not ended."""
        return name in self._living and not self._living[name].done()

    def start(self, role: str, name: str) -> None:
        """Start a process. Its name begins with its role."""
        self._living[name] = asyncio.get_running_loop().create_future()
        self._say(do="start", role=role, name=name)

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal; nothing happens when the process is gone."""
        self._say(do="signal", name=name, number=int(number))

    @property
    def fallen(self) -> list[str]:
        """The processes that ended neither in order nor by a signal, which is nobody's intention."""
        return [name for name, code in self.ended if code not in (0, -signal.SIGKILL, -signal.SIGTERM)]

    async def end(self, name: str) -> int:
        """Wait until a process has ended, and return its exit code; negative for a signal."""
        return await asyncio.shield(self._living[name])

    async def stop(self, names: Sequence[str], within: float) -> None:
        """End processes in order; one that does not end in time says what it was at, and is killed."""
        for name in names:
            self.signal(name, signal.SIGTERM)
        ending = {asyncio.create_task(self.end(name), name=name) for name in names}
        _, left = await asyncio.wait(ending, timeout=within) if ending else (ending, ending)
        for name in (each.get_name() for each in left):
            self.stuck.append(name)
            self.signal(name, signal.SIGUSR1)
            await asyncio.sleep(_TO_SAY)
            self.signal(name, signal.SIGKILL)
        await asyncio.gather(*left)

    async def __aenter__(self) -> Self:
        command = [sys.executable, "-m", "outbox.testing.crash.nursery", msgspec.json.encode(self._terms).decode()]
        with self._terms.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        self._listening = asyncio.create_task(self._listen())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        # It ends all of its children, and then itself, when nobody speaks to it any more.
        self._process.stdin.close()
        await self._process.wait()
        await self._listening

    def _say(self, **what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")

    async def _listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            name, code = json.loads(line)
            self.ended.append((name, code))
            if not self._living[name].done():
                self._living[name].set_result(code)


class _Forking:
    """The process's side."""

    def __init__(self, terms: Terms) -> None:
        self._terms = terms
        self._children: dict[int, str] = {}
        # Children notice by its end that this process is gone.
        self._lifeline, self._held = os.pipe()

    def run(self) -> None:
        """Do as told until nobody tells."""
        unread = b""
        while True:
            ready, _, _ = select.select([0], [], [], _TICK)
            if ready:
                read = os.read(0, 65_536)
                if not read:
                    break
                *lines, unread = (unread + read).split(b"\n")
                for line in lines:
                    self._do(**json.loads(line))
            self._reap(os.WNOHANG)
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
        while self._children:
            self._reap(0)

    def _do(self, do: str, name: str, role: str = "", number: int = 0) -> None:
        if do == "start":
            self._fork(role, name)
        for pid, known in self._children.items():
            if do == "signal" and known == name:
                os.kill(pid, number)

    def _fork(self, role: str, name: str) -> None:
        pid = os.fork()
        if pid:
            self._children[pid] = name
            return
        code = 1
        try:
            os.close(self._held)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            live(role, self._terms, name, self._lifeline)
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)

    def _reap(self, how: int) -> None:
        while self._children:
            pid, status = os.waitpid(-1, how)
            if not pid:
                return
            ended = [self._children.pop(pid), os.waitstatus_to_exitcode(status)]
            os.write(1, json.dumps(ended).encode() + b"\n")


def main(arguments: list[str]) -> None:
    """Be the nursery of a run."""
    terms = msgspec.json.decode(arguments[0], type=Terms)
    # The driver is imported with the first engine. What is there by now is never looked at again, nor copied.
    engine_of(terms, "nursery")
    gc.freeze()
    _Forking(terms).run()


if __name__ == "__main__":
    main(sys.argv[1:])
