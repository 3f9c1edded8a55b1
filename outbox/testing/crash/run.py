"""Run: a whole run of the crash lab, from an empty server to the report."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
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
from outbox.testing.crash.numbers import reached, short
from outbox.testing.crash.nursery import Nursery
from outbox.testing.crash.plan import Strike, plan
from outbox.testing.crash.roles import registrations
from outbox.testing.crash.sweep import sweep
from outbox.testing.crash.terms import SPARED, Terms, config_of, engine_of
from outbox.testing.crash.wire import Request, ask
from outbox.testing.crash.writing import create_items, track_items
from outbox.testing.history import BrokenHistory, History, Recording
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
# What a slow machine did not reach in its time it may make up for, for as long again at most.
_ROUND = 60.0
# Of the strikes of such a round one in so many is carried out, where it is for events alone.
_SPARING = 8
# What secondaries answer, and how calls end, in a run that is asked for numbers and long enough for what is rare.
_LONG = 300.0
_SEEN = ("stale", "retry", "refused", "rejected", "answered", "raised", "cut", "abandoned", "not_synced")
_DRAIN = timedelta(seconds=300)


async def run(terms: Terms) -> tuple[Report, list[str]]:
    """Return what the checker says of a run, and what should not have been: who ended by himself, or never."""
    async with AsyncExitStack() as running:
        server = EmbeddedPostgres(settings=_SETTINGS)
        running.callback(server.close)
        await asyncio.to_thread(server.start)
        proxy = await running.enter_async_context(Proxy(server.port, _STAGES))
        terms = replace(terms, dsn=str(make_url(server.dsn()).set(port=proxy.port)))
        history = running.enter_context(History(terms.history, process="harness", role="harness"))
        nursery = await running.enter_async_context(Nursery(terms))
        await _prepare(terms, nursery)
        sweeping = asyncio.create_task(sweep(server.dsn(driver="postgresql")))
        running.callback(sweeping.cancel)
        if terms.prunes:
            history.write(Pruned())
        people = Population(terms, nursery)
        for role in ("writer", "relay", SPARED, "prover"):
            people.keep(role)
        nemesis = Nemesis(terms, nursery, server, proxy, history)
        missing: list[str] = []
        for each in _rounds(terms):
            # A slow machine writes little under all of them.
            strikes = plan(each)[:: _SPARING if missing == ["events"] else 1]
            await nemesis.carry_out(strikes, each.seconds)
            if not (missing := await asyncio.to_thread(_short, terms)):
                break
        await people.stop("prover")
        await people.stop("writer")
        await _end(terms, people, history)
    amiss = [f"ended by itself: {name}" for name in nursery.fallen]
    amiss += [f"did not end when told to: {name}" for name in nursery.stuck]
    amiss += [f"a strike that never ended: {name}" for name in nemesis.stuck]
    return check(Recording(terms.history)), amiss


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
        history.write(_promised(terms, plan(terms)))
        if await _drained(engine):
            history.write(Drained())
        await people.stop("relay")
        await people.stop(SPARED)
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


def _rounds(terms: Terms) -> Iterator[Terms]:
    """Yield what is to be carried out, one after the other until all that was asked for is reached."""
    yield terms
    if terms.asked:
        seconds = max(min(_ROUND, terms.seconds), terms.seconds / 10)
        for number in range(1, 1 + math.ceil(terms.seconds / seconds)):
            yield replace(terms, seed=terms.seed + number * 1_000_003, seconds=seconds)


def _short(terms: Terms) -> list[str]:
    try:
        return short(terms.asked, reached(Recording(terms.history)))
    except BrokenHistory:
        # Somebody was just writing its last line, and there is time to look again.
        return ["unread"]


def _promised(terms: Terms, strikes: list[Strike]) -> Promised:
    """A tenth of what is planned must come about, one at each point; where a beat is awaited, some may."""
    config = config_of(terms)
    planned = Counter(strike.name for strike in strikes if strike.stage != "heartbeat")
    enough = {strike.name: _ENOUGH_AT_A_POINT if strike.waits else _ENOUGH for strike in strikes}
    within = config.lease + max(config.retry_max, config.breaker_max) + timedelta(seconds=10)
    # Commits whose answer was lost, settles that came too late, and deliveries that were repeated.
    struck = ("unknown", "fenced", "again", "resumed") if {"cut", "stop", "kill"} <= {*terms.faults} else ()
    everything = terms.asked and terms.seconds >= _LONG
    rare = ("synced", "reconciled", "counted", "bulk", *struck, *(_SEEN if everything else ()))
    often = ("committed", "rolled_back", "recorded", "undone", "applied", "claimed", "settled", "asked")
    return Promised(
        seed=terms.seed,
        faults={
            name: 1 if enough[name] == _ENOUGH_AT_A_POINT else max(1, times // 10)
            for name, times in planned.items()
            if times >= enough[name]
        }
        | ({"deadly": 1} if everything else {}),
        operations=dict.fromkeys(often, max(1, int(terms.seconds / 2))) | dict.fromkeys(rare, 1),
        most_attempts=config.max_attempts,
        # On average: a fault may find eight batches in hand, and most find none.
        most_again=config.batch_size,
        converge_within=within // timedelta(microseconds=1) * 1_000,
    )
