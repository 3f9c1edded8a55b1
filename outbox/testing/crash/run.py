"""Run: a whole run of the crash lab, from an empty server to the report."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from datetime import timedelta

from msgspec.structs import replace
from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.claim import CLAIM
from outbox.lease import HEARTBEAT
from outbox.load import LOAD, LOAD_HELD
from outbox.manager import SyncManager
from outbox.migrate import migrate
from outbox.prune import FOLD, PRUNE_EVENTS
from outbox.resume import RESUME
from outbox.settle import CLOSE, SETTLE
from outbox.testing.checker import Report, check
from outbox.testing.crash.dump import dump, owed
from outbox.testing.crash.nemesis import Nemesis, Population
from outbox.testing.crash.nursery import Nursery
from outbox.testing.crash.plan import Strike, plan
from outbox.testing.crash.roles import registrations
from outbox.testing.crash.terms import Terms, config_of, engine_of
from outbox.testing.crash.wire import Request, ask
from outbox.testing.crash.writing import create_items, track_items
from outbox.testing.history import History, Recording
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.proxy import Proxy
from outbox.testing.records import Drained, Promised, Pruned

__all__ = ["run"]

# Only a crash of the machine could undo what these leave to it, and here nothing but processes crashes.
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
# The texts as relays send them.
_STATEMENTS = {
    "claim": (CLAIM, RESUME),
    "load": (LOAD, LOAD_HELD),
    "settle": (CLOSE, SETTLE),
    "tidy": (FOLD, PRUNE_EVENTS),
    "heartbeat": (HEARTBEAT,),
}
_STAGES = {each.asyncpg("public")[0]: stage for stage, found in _STATEMENTS.items() for each in found}
# With fewer, it may be that none comes about: the primary is away, or nobody passes the point.
_ENOUGH, _ENOUGH_AT_A_POINT = 3, 10
# What relays carry at least, all together, on a machine that has other things to do.
_PER_SECOND = 50
_DRAIN = timedelta(seconds=300)


async def run(terms: Terms) -> tuple[Report, list[str]]:
    """Return what the checker says of a run, and which processes ended by themselves, which none should."""
    async with AsyncExitStack() as running:
        server = EmbeddedPostgres(settings=_SETTINGS)
        running.callback(server.close)
        await asyncio.to_thread(server.start)
        proxy = await running.enter_async_context(Proxy(server.port, _STAGES))
        terms = replace(terms, dsn=str(make_url(server.dsn()).set(port=proxy.port)))
        history = running.enter_context(History(terms.history, process="harness", role="harness"))
        nursery = await running.enter_async_context(Nursery(terms))
        await _prepare(terms, nursery)
        if terms.prunes:
            history.write(Pruned())
        people = Population(terms, nursery)
        people.keep("writer")
        people.keep("relay")
        people.keep("prover")
        await Nemesis(terms, nursery, server, proxy, history).carry_out(plan(terms))
        await people.stop("prover")
        await people.stop("writer")
        await _end(terms, people, history)
    return check(Recording(terms.history)), nursery.fallen


async def _prepare(terms: Terms, nursery: Nursery) -> None:
    nursery.start("shelf", "shelf-1")
    engine = engine_of(terms, "harness")
    await migrate(engine)
    await create_items(engine)
    manager = SyncManager(engine, registrations(terms, ""), config=config_of(terms))
    await manager.register()
    await engine.dispose()
    while True:
        try:
            await ask(terms.shelf, Request(asks="check", backend_id="index"))
        except OSError:
            await asyncio.sleep(0.05)
        else:
            return


async def _end(terms: Terms, people: Population, history: History) -> None:
    """Wait until nothing is owed any more, and read everything."""
    engine = engine_of(terms, "harness")
    try:
        history.write(_promised(terms, plan(terms), await owed(engine)))
        if await _drained(engine):
            history.write(Drained())
        await people.stop("relay")
        manager = SyncManager(engine, registrations(terms, "harness"), config=config_of(terms))
        track_items(manager)
        await dump(manager, history)
    finally:
        await engine.dispose()


async def _drained(engine: AsyncEngine) -> bool:
    deadline = time.monotonic() + _DRAIN.total_seconds()
    while await owed(engine):
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def _promised(terms: Terms, strikes: list[Strike], backlog: int = 0) -> Promised:
    """A tenth of what is planned must come about, or the run has shown nothing; where a beat is awaited, some may.

    What was owed when the faults ended takes its time as well.
    """
    config = config_of(terms)
    planned = Counter(strike.name for strike in strikes if strike.stage != "heartbeat")
    enough = {strike.name: _ENOUGH_AT_A_POINT if strike.waits else _ENOUGH for strike in strikes}
    within = config.lease + config.retry_max + config.breaker_max + timedelta(seconds=10 + backlog / _PER_SECOND)
    # Commits whose answer was lost, settles that came too late, and deliveries that were repeated.
    rare = ("synced", "reconciled", "unknown", "fenced", "again") if {"cut", "stop", "kill"} <= {*terms.faults} else ()
    often = ("committed", "rolled_back", "recorded", "undone", "applied", "claimed", "settled", "asked")
    return Promised(
        seed=terms.seed,
        faults={name: max(1, times // 10) for name, times in planned.items() if times >= enough[name]},
        operations=dict.fromkeys(often, max(1, int(terms.seconds / 2))) | dict.fromkeys(rare, 1),
        most_attempts=config.max_attempts,
        converge_within=within // timedelta(microseconds=1) * 1_000,
    )
