"""The demo: six acts on real servers, from the first write to the proof that every secondary equals the primary."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import typer

from outbox.demo_damage import damage_cache, damage_reporting, draw_damage
from outbox.demo_data import TENANTS, Life, Resource, new_rows, read_sample, track_types
from outbox.demo_screen import Act, Screen, open_screen
from outbox.demo_stage import CACHE, REPORTING, SEARCH, DemoFailed, Stage, Statuses, open_stage
from outbox.interrupt import until_signal
from outbox.migrate import migrate
from outbox.reconciliation import ReconciliationResult
from outbox.render import drift_text
from outbox.status import lag_text
from outbox.testing.fhir import FhirResource

__all__ = ["run_demo"]

_ACTS = (
    Act("Load", "FHIR resources of two clinics are stored; a relay carries them to three secondaries."),
    Act("Life", "The clinics change them all day. What they roll back must not arrive anywhere."),
    Act("Outage", "The search index is killed (SIGKILL). It falls behind; the others must not notice."),
    Act("Return", "The index starts again, empty: it lives in memory. What it is owed must drain."),
    Act("Damage", "Somebody edits the secondaries behind our back. Reconcile must find and repair it."),
    Act("Proof", "Every resource on every secondary is compared with the primary, by its content."),
)
_NAMES = (CACHE, REPORTING, SEARCH)
_PER_TRANSACTION = 25
_LAG = "select * from outbox_lag"
_COUNT = "select count(*) from outbox_resources where content is not null"


class _Pace(NamedTuple):
    """How much happens, and how long there is to look: transactions a second, seconds of each kind."""

    rate: float
    life: float
    outage: float
    reading: float
    transactions: int
    owed: int


_FOR_PEOPLE = _Pace(rate=30, life=9, outage=9, reading=2.5, transactions=100, owed=100)
_ONCE = _Pace(rate=200, life=0, outage=0, reading=0, transactions=80, owed=40)


def run_demo(*, once: bool = False, keep: bool = False, data: Path | None = None, seed: int = 1) -> int:
    """Play the demo and return its exit status: 0 only if the last act proved that all is equal, else 1.

    `once` goes through it as fast as possible, in plain lines. `keep` leaves the servers running afterwards, until a
    signal. A signal ends it in order, with 128 plus its number. Raises `ServerMissing`, `ServerFailed`.
    """
    if os.environ.get("OUTBOX_DEBUG") != "1":
        # The warnings of an outage that we cause ourselves would tear the picture.
        logging.getLogger().addHandler(logging.NullHandler())
    try:
        return until_signal(_play(once=once, keep=keep, sample=read_sample(data), seed=seed))
    except DemoFailed as failed:
        sys.stderr.write(f"outbox demo failed: {failed}\n")
        return 1


async def _play(*, once: bool, keep: bool, sample: Sequence[FhirResource], seed: int) -> int:
    started = time.monotonic()
    with ExitStack() as curtain:
        screen = curtain.enter_context(open_screen(_ACTS, plain=once))
        screen.open_act(0)
        screen.say("starting PostgreSQL, an OpenSearch-compatible index and Valkey")
        async with open_stage() as stage:
            play = _Play(stage, screen, sample, seed, _ONCE if once else _FOR_PEOPLE)
            results = await play.run()
            # The picture stays as it is, and lines follow it.
            curtain.close()
            equal = _show_proof(results, len(play.life.alive), time.monotonic() - started)
            if keep:
                await _keep(stage)
    return 0 if equal else 1


class _Play:
    """The acts, in the order they are played."""

    def __init__(self, stage: Stage, screen: Screen, sample: Sequence[FhirResource], seed: int, pace: _Pace) -> None:
        self.life = Life(stage.manager, sample, seed)
        self._stage = stage
        self._screen = screen
        self._sample = sample
        self._seed = seed
        self._pace = pace
        self._working = True
        self._worst: dict[str, float] = {}
        self._results: list[ReconciliationResult] = []
        stage.on_look = self._seen

    async def run(self) -> Sequence[ReconciliationResult]:
        """Play all acts; return what the last one found."""
        acts = (self._load, self._live, self._lose, self._return, self._damage, self._prove)
        for number, act in enumerate(acts):
            if number:
                self._screen.open_act(number)
            self._worst.clear()
            self._screen.close_act(await act())
            await asyncio.sleep(self._pace.reading)
        return self._results

    async def _load(self) -> str:
        stage, started = self._stage, time.monotonic()
        await migrate(stage.engine)
        async with stage.engine.begin() as connection:
            await connection.run_sync(Resource.metadata.create_all)
        track_types(stage.manager, {each.resource_type for each in self._sample})
        await stage.manager.register()
        stage.start_relay()
        self._screen.say(f"{len(self._sample):,} for each clinic, {_PER_TRANSACTION} in a transaction")
        parts = [self._sample[at : at + _PER_TRANSACTION] for at in range(0, len(self._sample), _PER_TRANSACTION)]
        for number, (tenant, part) in enumerate((tenant, part) for tenant in TENANTS for part in parts):
            async with stage.manager.session() as session, session.begin():
                session.add_all(new_rows(tenant, part))
            self._screen.progress((number + 1) / (len(TENANTS) * len(parts)))
        await stage.drained()
        return (
            f"{len(self.life.alive):,} resources in {len(TENANTS) * len(parts)} transactions; "
            f"all three secondaries had them after {time.monotonic() - started:.1f} s"
        )

    async def _live(self) -> str:
        life, pace = self.life, self._pace
        self._stage.run(self._work())
        await self._for(pace.life, lambda _: life.transactions >= pace.transactions and len(life.added) > 0)
        await self._look_for_somebody_added()
        if there := await self._arrived(life.undone):
            raise DemoFailed(f"{there} resources arrived although their transactions were rolled back")
        return (
            f"{sum(life.revised.values()):,} revised, {len(life.added)} added, {len(life.removed)} removed, "
            f"{len(life.undone)} rolled back without a trace; lag up to {self._worst_of(*_NAMES)}"
        )

    async def _lose(self) -> str:
        before = await self._stage.look()
        self._worst.clear()
        await self._stage.aside(self._stage.index.kill)
        owed = self._pace.owed
        now = await self._for(
            self._pace.outage, lambda seen: seen[SEARCH].breaker != "closed" and seen[SEARCH].pending >= owed
        )
        lost = now[SEARCH]
        if spent := lost.retried - before[SEARCH].retried + lost.failing + lost.dead:
            raise DemoFailed(f"the outage of the index cost {spent} attempts, and must not cost any")
        for name in (CACHE, REPORTING):
            if now[name].breaker != "closed" or now[name].applied <= before[name].applied:
                raise DemoFailed(f"{name} stood still while {SEARCH} was down")
        return (
            f"{lost.pending:,} owed to search, {lag_text(lost.lag)} late, breaker open, no attempt spent; "
            f"others up to {self._worst_of(CACHE, REPORTING)}"
        )

    async def _return(self) -> str:
        started = time.monotonic()
        await self._stage.aside(self._stage.index.start)
        await self._stage.until(lambda seen: seen[SEARCH].breaker == "closed", "the breaker closes")
        self._working = False
        await self._stage.until(lambda seen: seen[SEARCH].pending == 0, "what the index is owed drains")
        await self._stage.drained()
        return (
            f"breaker closed, all it was owed drained in {time.monotonic() - started:.1f} s; "
            "what it held before is gone"
        )

    async def _damage(self) -> str:
        stage = self._stage
        for_cache, for_reporting = await draw_damage(stage.engine, self.life, self._seed)
        await damage_cache(stage.valkey.url, for_cache)
        await damage_reporting(stage.postgres.dsn("reporting"), for_reporting)
        planted = {CACHE: for_cache.drift(), REPORTING: for_reporting.drift()}
        missing, extra, stale, altered = planted[CACHE]
        self._screen.say(
            f"in cache and database, each: {missing} deleted, {altered} altered, {extra} smuggled in, {stale} set back"
        )
        await asyncio.sleep(self._pace.reading)
        results = await self._compare(repair=True)
        for each in results:
            found = (each.missing, each.extra, each.stale, each.altered)
            if found != planted.get(each.backend_id, (each.missing, 0, 0, 0)) or each.repaired != sum(found):
                raise DemoFailed(f"{each.backend_id}: reconcile found or repaired something else than was done")
        await stage.drained()
        repaired = sum(each.repaired for each in results)
        return f"{drift_text(*results)} found; {repaired:,} repairs went through the outbox"

    async def _prove(self) -> str:
        self._results = await self._compare(repair=False)
        pairs = sum(each.primary_count for each in self._results)
        return f"{drift_text(*self._results)} in {pairs:,} pairs of digests"

    async def _compare(self, *, repair: bool) -> list[ReconciliationResult]:
        results: list[ReconciliationResult] = []
        for name in _NAMES:
            self._screen.reconciled(results)
            results.append(await self._stage.manager.reconcile(name, repair=repair))
            self._screen.progress(len(results) / len(_NAMES))
            self._screen.say(f"{name}: {drift_text(results[-1])}")
        self._screen.reconciled(results)
        return results

    async def _work(self) -> None:
        """Run transactions at a steady rate until told to stop; a late one is not made up for."""
        while self._working:
            started = time.monotonic()
            await self.life.go_on()
            await asyncio.sleep(max(0.0, started + 1 / self._pace.rate - time.monotonic()))

    async def _for(self, seconds: float, holds: Callable[[Statuses], bool]) -> Statuses:
        """Look for so long, and then until `holds`."""
        started = time.monotonic()
        while (passed := time.monotonic() - started) < seconds:
            self._screen.progress(passed / seconds)
            await self._stage.look()
            await asyncio.sleep(0.1)
        return await self._stage.until(holds, "what this act is to show is there")

    async def _look_for_somebody_added(self) -> None:
        """Return once somebody who was added is seen: that shows that our eyes are good for those who must not be."""
        deadline = time.monotonic() + 60
        while not await self._arrived([key for key in self.life.added if key in self.life.alive]):
            if time.monotonic() > deadline:
                raise DemoFailed("nobody who was added arrived")
            await self._stage.look()

    async def _arrived(self, keys: Sequence[tuple[str, str, str]]) -> int:
        secondaries = (self._stage.search, self._stage.cache, self._stage.reporting)
        asked = [
            secondary.content_of(kind, name, tenant_id=tenant)
            for secondary in secondaries
            for tenant, kind, name in keys
        ]
        return sum(content is not None for content in await asyncio.gather(*asked))

    def _worst_of(self, *names: str) -> str:
        return f"{max(self._worst.get(name, 0.0) for name in names):.1f} s"

    def _seen(self, statuses: Statuses) -> None:
        for name, each in statuses.items():
            self._worst[name] = max(self._worst.get(name, 0.0), each.lag.total_seconds())
        self._screen.statuses(statuses)


def _show_proof(results: Sequence[ReconciliationResult], alive: int, seconds: float) -> bool:
    """Print what was compared and what differs; return whether all is equal, and not for want of resources."""
    typer.echo("")
    for each in results:
        typer.echo(
            f"{each.backend_id:<9}  {drift_text(each)}   "
            f"({each.primary_count:,} compared in {each.duration.total_seconds():.1f} s)"
        )
    counts = {count for each in results for count in (each.primary_count, each.secondary_count)}
    equal = all(each.in_sync and each.in_flight == 0 for each in results) and counts == {alive} and alive > 0
    pairs = sum(each.primary_count for each in results)
    took = sum(each.duration.total_seconds() for each in results)
    typer.echo(f"{pairs:,} pairs of digests of content compared in {took:.1f} s; the whole demo took {seconds:.0f} s")
    typer.echo(drift_text(*results))
    return equal


async def _keep(stage: Stage) -> None:
    """Say how to look at everything, and leave it running until a signal comes."""
    stage.on_look = lambda _: None
    primary = stage.postgres.dsn("clinic", driver="postgresql")
    reporting = stage.postgres.dsn("reporting", driver="postgresql")
    for line in (
        "",
        "Everything is still running, the relay too. Ctrl-C ends it.",
        f"  primary    psql {primary} -c '{_LAG}'",
        f"  search     curl '{stage.index.url}/outbox-patient/_search?size=1'",
        f"  cache      valkey-cli -p {stage.valkey.port} zrange outbox:{TENANTS[0]}:Patient 0 -1",
        f"  reporting  psql {reporting} -c '{_COUNT}'",
        f"  status     outbox status --dsn {primary}",
    ):
        typer.echo(line)
    while True:
        await stage.look()
        await asyncio.sleep(1)
