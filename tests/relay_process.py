"""A relay in a process of its own, to be killed, paused and stopped; what it did survives in another database.

As a program it is that process: its argument is what `RelayProcess` was given, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine

from outbox import Registration, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale
from tests.relaying import quick
from tests.scripted import Exit, Hang, ScriptedSecondary, Step, position_of
from tests.waiting import eventually

_ROOT = Path(__file__).parent.parent
_TABLES = """
create table effect (
    backend_id text, tenant_id text, resource_type text, resource_id text, position bigint not null, content text,
    primary key (backend_id, tenant_id, resource_type, resource_id)
);
create table asked (
    number bigint generated always as identity primary key,
    backend_id text not null, position bigint not null, resource_id text not null, process_id integer not null,
    at timestamptz not null default clock_timestamp()
);
create table gate (name text primary key);
"""
# The guard: what is not above the position held changes nothing.
_KEEP = """
insert into effect as held values ($1, $2, $3, $4, $5, $6)
on conflict (backend_id, tenant_id, resource_type, resource_id) do update
set position = excluded.position, content = excluded.content where held.position < excluded.position
returning position
"""
_IS_OPEN = "select exists (select from gate where name = $1)"
_ASKED = "insert into asked (backend_id, position, resource_id, process_id) values ($1, $2, $3, $4)"


def told(resource_id: str, step: str, *, tenant: str = "default") -> SyncEvent:
    """An event whose content tells the process what to do with it: `exit`, `hang`, `refuse`, `retry`, `reject`.

    `wait:NAME` hangs until the gate of that name is open, `late:NAME` takes effect first, `late-refuse:NAME` waits for
    the gate and then finds the secondary unavailable.
    """
    return SyncEvent.update("Thing", resource_id, json.dumps({"step": step}), tenant_id=tenant)


class Effects:
    """The database in which the processes' secondaries keep what was applied, and log what they were asked."""

    def __init__(self, dsn: str, pool: asyncpg.Pool[Any]) -> None:
        self.dsn = dsn
        self._pool = pool

    async def open_gate(self, name: str) -> None:
        """Let everything go on that waits for this gate."""
        await self._pool.execute("insert into gate values ($1) on conflict do nothing", name)

    async def asked(self, resource_id: str | None = None) -> list[asyncpg.Record]:
        """What secondaries were asked to apply, in the order they were."""
        query = "select * from asked where $1::text is null or resource_id = $1 order by number"
        return await self._pool.fetch(query, resource_id)

    async def held(self, backend_id: str = "effects") -> dict[str, int]:
        """The position held of each resource."""
        query = "select resource_id, position from effect where backend_id = $1"
        return {row[0]: row[1] for row in await self._pool.fetch(query, backend_id)}


@asynccontextmanager
async def effects_in(dsn: str) -> AsyncIterator[Effects]:
    """Prepare an empty database for effects and look into it."""
    dsn = dsn.replace("postgresql+asyncpg", "postgresql")
    async with asyncpg.create_pool(dsn, min_size=0, max_size=2) as pool:
        await pool.execute(_TABLES)
        yield Effects(dsn, pool)


class RelayProcess:
    """A process that runs one relay until it is told to stop; killed at the end of the `with` block at the latest.

    `backends` maps names to orderings. What the process prints is in `output`.
    """

    def __init__(
        self,
        primary: str,
        effects: str,
        log: Path,
        *,
        backends: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (),
        **settings: Any,
    ) -> None:
        given = {"primary": primary, "effects": effects, "backends": backends or {"effects": "state"}}
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, sys.executable, "-m", "tests.relay_process", json.dumps(given | {"settings": settings})],
                # It ends when this end of the pipe closes, so it cannot outlive the tests.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=_ROOT,
                env=os.environ | {"PYTHONPATH": str(_ROOT)} | dict(environment or {}),
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it with SIGKILL, as a crash would."""
        self._process.kill()
        self._process.wait(timeout=10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait(timeout=10)
        assert self._process.stdin is not None
        self._process.stdin.close()
        if error is not None:
            error.add_note(f"relay process {self.pid}, exit code {self.code}, said:\n{self.output[-4000:]}")


class EffectsSecondary(ScriptedSecondary):
    """Keeps effects in the other database and takes its steps from the events themselves."""

    def __init__(self, backend_id: str, pool: asyncpg.Pool[Any]) -> None:
        super().__init__(backend_id)
        self._pool = pool

    def step_for(self, event: SyncEvent) -> Step | None:
        return _STEPS.get(_told(event))

    async def check(self) -> None:
        await self._pool.fetchval("select 1")

    async def note(self, events: list[SyncEvent]) -> None:
        logged = [(self.backend_id, position_of(event), event.resource_id, os.getpid()) for event in events]
        await self._pool.executemany(_ASKED, logged)

    async def keep_all(self, events: list[SyncEvent], steps: dict[int | None, Step]) -> list[Outcome]:
        await self._pass_gates(events, "wait")
        await self._pass_gates(events, "late-refuse")
        outcomes = [await self._keep_one(event, steps.get(event.position)) for event in events]
        await self._pass_gates(events, "late")
        return outcomes

    async def _keep_one(self, event: SyncEvent, step: Step | None) -> Outcome:
        if isinstance(step, (Retry, Rejected)):
            return step
        kept = await self._pool.fetchval(_KEEP, self.backend_id, *event.key, event.position, event.content)
        return Stale() if kept is None else Applied()

    async def _pass_gates(self, events: list[SyncEvent], kind: str) -> None:
        for event in events:
            step, _, name = _told(event).partition(":")
            if step == kind:
                await eventually(partial(self._pool.fetchval, _IS_OPEN, name), within=timedelta(minutes=2))
                if kind == "late-refuse":
                    raise Unavailable("refused", "as the event says")


_STEPS: dict[str, Step] = {
    "exit": Exit(70),
    "hang": Hang(),
    "refuse": Unavailable("refused", "as the event says"),
    "retry": Retry("told", "as the event says"),
    "reject": Rejected("told", "as the event says"),
}


def _told(event: SyncEvent) -> str:
    return str((event.decoded() or {}).get("step", ""))


def _end_with_parent() -> None:
    # Not through a buffer, whose lock this thread would hold when the process ends in order.
    os.read(0, 1)
    os._exit(71)


async def _main(primary: str, effects: str, backends: dict[str, str], settings: dict[str, Any]) -> None:
    engine = create_async_engine(primary)
    async with asyncpg.create_pool(effects, min_size=0, max_size=4) as pool:
        registrations = [
            Registration(EffectsSecondary(backend_id, pool), ordering="log" if ordering == "log" else "state")
            for backend_id, ordering in backends.items()
        ]
        relay = SyncManager(engine, registrations, config=quick(**settings)).relay()
        relay.stop_on_signals()
        sys.stdout.write(f"running at {time.time()}\n")
        sys.stdout.flush()
        await relay.run()
    await engine.dispose()


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_main(**json.loads(sys.argv[1])))
