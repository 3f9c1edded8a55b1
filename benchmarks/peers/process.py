"""One system at one task in a process of its own, on uvloop, so that nobody pays for another's imports and threads.

    python -m benchmarks.peers.process JSON

The child says `ready` when all is loaded, begins at a line of input, and ends with what it found as JSON.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import sys
import time
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Literal

import msgspec
import uvloop

from benchmarks.ground import CONTENT
from benchmarks.peers.base import Body, Peer, Recorder

# Where each is; a module is imported in the child only, so what is not installed fails there and alone.
PEERS = {
    "outbox": ("ours", "Ours"),
    "outbox-three": ("ours", "OursThree"),
    "pgqueuer": ("pgqueuer", "PgQueuer"),
    "awa": ("awa", "Awa"),
    "faststream": ("faststream", "FastStream"),
    "procrastinate": ("procrastinate", "Procrastinate"),
}
BODY: Body = msgspec.json.decode(CONTENT)
BULK = 1_000
_PATIENCE = 120.0
_LOOK = 0.01


class Missing(Exception):
    """A system that is not installed, or does not start here."""


class Asked(msgspec.Struct):
    """`prepare` fills, `single` and `bulk` record for so many seconds, `paced` so many at a rate, `relay` drains."""

    peer: str
    dsn: str
    do: Literal["prepare", "single", "bulk", "paced", "relay"]
    events: int = 0
    seconds: float = 0
    rate: float = 0
    quick: bool = False


class Found(msgspec.Struct):
    """How many per second, and for each that carried the time of its recording the milliseconds since."""

    rate: float = 0
    lags: list[float] = []


class Taken:
    """What was handed over. The clock starts with the first."""

    def __init__(self) -> None:
        self.events = 0
        self.lags: list[float] = []
        self.first_at = self.last_at = 0.0

    def take(self, body: Body) -> None:
        self.last_at = time.monotonic()
        self.first_at = self.first_at or self.last_at
        self.events += 1
        if at := body.get("at"):
            self.lags.append((self.last_at - at) * 1000)

    @property
    def rate(self) -> float:
        return (self.events - 1) / (self.last_at - self.first_at)


def made(peer: str, dsn: str, *, quick: bool) -> Peer:
    """Import a system and return it. Raises `ImportError`."""
    module, name = PEERS[peer]
    found: Peer = getattr(importlib.import_module(f"benchmarks.peers.{module}"), name)(dsn, quick=quick)
    return found


async def relay(peer: Peer, asked: Asked) -> Found:
    taken, owed = Taken(), asked.events * peer.secondaries
    running = asyncio.create_task(peer.relay(taken.take))
    deadline = time.monotonic() + _PATIENCE
    while taken.events < owed and not running.done():
        assert time.monotonic() < deadline, f"{taken.events} of {owed} handed over"
        await asyncio.sleep(_LOOK)
    if running.done():
        running.result()
    return Found(taken.rate, taken.lags)


async def paced(recorder: Recorder, asked: Asked) -> Found:
    started = time.monotonic()
    for number in range(asked.events):
        await asyncio.sleep(max(0.0, started + number / asked.rate - time.monotonic()))
        await recorder.one(BODY | {"at": time.monotonic()})
    return Found(asked.events / (time.monotonic() - started))


async def recorded(recorder: Recorder, asked: Asked) -> Found:
    """Record for so many seconds, after one call that warms up."""
    bodies = [BODY] * BULK
    once = partial(recorder.one, BODY) if asked.do == "single" else partial(recorder.many, bodies)
    await once()
    started, calls = time.monotonic(), 0
    while (elapsed := time.monotonic() - started) < asked.seconds:
        await once()
        calls += 1
    return Found(calls * (1 if asked.do == "single" else BULK) / elapsed)


async def prepared(peer: Peer, asked: Asked) -> Found:
    await peer.prepare()
    async with peer.recording() as recorder:
        for start in range(0, asked.events, BULK):
            await recorder.many([BODY] * min(BULK, asked.events - start))
    return Found()


async def done(peer: Peer, asked: Asked) -> Found:
    if asked.do in ("prepare", "relay"):
        return await (prepared if asked.do == "prepare" else relay)(peer, asked)
    async with peer.recording() as recorder:
        return await (paced if asked.do == "paced" else recorded)(recorder, asked)


class Running:
    """The process, seen from outside."""

    def __init__(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdin is not None
        assert child.stdout is not None
        self._child, self._to, self._from = child, child.stdin, child.stdout

    async def go(self) -> None:
        """Have it begin, once all is loaded."""
        line = await self._from.readline()
        if line != b"ready\n":
            raise Missing(line.decode().strip() or "it could not be loaded")
        self._to.write(b"go\n")

    async def finish(self) -> Found:
        """Return what it found. Raises `Missing` when it ended without."""
        said = (await self._from.read()).splitlines()
        if await self._child.wait() or not said:
            raise Missing("it failed; what it said stands above")
        return msgspec.json.decode(said[-1], type=Found)


@asynccontextmanager
async def running(asked: Asked) -> AsyncIterator[Running]:
    """Start the process; it is ended with the block at the latest."""
    command = [sys.executable, "-m", "benchmarks.peers.process", msgspec.json.encode(asked).decode()]
    pipe = asyncio.subprocess.PIPE
    # What it noted of latencies is one line, and may be long.
    child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, limit=2**24)
    try:
        yield Running(child)
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def asked_for(asked: Asked) -> Found:
    """Have it done, all of it."""
    async with running(asked) as process:
        await process.go()
        return await process.finish()


def main() -> None:
    asked = msgspec.json.decode(sys.argv[1], type=Asked)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    try:
        peer = made(asked.peer, asked.dsn, quick=asked.quick)
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return
    print("ready", flush=True)
    sys.stdin.readline()
    print(msgspec.json.encode(uvloop.run(_found(peer, asked))).decode(), flush=True)


async def _found(peer: Peer, asked: Asked) -> Found:
    found = await done(peer, asked)
    if asked.do == "relay":
        # Stopping each in its own way is not what is measured, and some have threads of their own.
        print(msgspec.json.encode(found).decode(), flush=True)
        os._exit(0)
    return found


if __name__ == "__main__":
    main()
