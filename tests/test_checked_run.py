"""A whole run on a real primary, told and judged: the checker agrees with what really happens (D8, N1, C1, W1)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, SyncEvent, SyncManager, SyncToken, record
from outbox.content import content_digest
from outbox.secondaries.base import Applied, Outcome, Retry
from outbox.testing import records as said
from outbox.testing.checker import Report, check
from outbox.testing.checks.verdict import Answer
from outbox.testing.dump import dump_secondary, dump_tables
from outbox.testing.history import History, Recording
from outbox.testing.records import Entry
from tests.relaying import execute, manager_of, running, value
from tests.waiting import eventually

LOCK = text("select pg_advisory_xact_lock(hashtext(:name))")
SEED = 7
PLACES = [("acme", "Thing"), ("other", "Thing")]


class TellingSecondary(MemorySecondary):
    """Tells the history what it is asked and what it does; now and then it fails an event or a whole call."""

    def __init__(self, backend_id: str, history: History, chance: random.Random) -> None:
        super().__init__(backend_id)
        self._history, self._chance, self._calls = history, chance, count(1)
        self.failing = 0.1
        history.write(said.Opened(pid=1, role="secondary", backend_id=backend_id))

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        call = f"{self.backend_id}-{next(self._calls)}"
        self._history.write(
            said.Asked(backend_id=self.backend_id, call=call, entries=[entry_of(event) for event in batch])
        )
        await asyncio.sleep(0)
        outcomes = [self._kept(event, call) for event in batch]
        lost = self._chance.random() < self.failing
        how = "cut" if lost else "answered"
        self._history.write(said.Answered(backend_id=self.backend_id, call=call, how=how))
        if lost:
            raise ConnectionResetError
        return outcomes

    def _kept(self, event: SyncEvent, call: str) -> Outcome:
        assert event.position is not None
        if self._chance.random() < self.failing:
            outcome: Outcome = Retry("busy")
        else:
            outcome = self._keep(event)
        if isinstance(outcome, Applied):
            self._history.write(said.Applied(backend_id=self.backend_id, call=call, entries=[entry_of(event)]))
        else:
            why = type(outcome).__name__.lower()
            positions = [event.position]
            self._history.write(said.Refused(backend_id=self.backend_id, call=call, positions=positions, why=why))
        return outcome


def entry_of(event: SyncEvent, position: int = 0) -> Entry:
    return Entry(position or event.position or 0, *event.key, content_digest(event.content) if event.content else "")


async def write_some(manager: SyncManager, history: History, writer: str, chance: random.Random) -> None:
    """Commit or roll back, wait for some of it, and tell of all."""
    for number in range(25):
        transaction = f"{writer}/{number}"
        events = list(changes(chance, transaction))
        history.write(said.Began(transaction=transaction))
        commits = chance.random() < 0.8
        async with manager.engine.connect() as connection:
            for name in sorted(event.resource_id for event in events):
                # As an application's row locks do: they put a key's positions in commit order.
                await connection.execute(LOCK, {"name": name})
            token = await record(connection, events)
            told = zip(events, token.positions, strict=True)
            entries = [entry_of(event, position) for event, position in told]
            history.write(said.Recorded(transaction=transaction, entries=entries))
            await (connection.commit() if commits else connection.rollback())
        history.write(said.Ended(transaction=transaction, how="committed" if commits else "rolled_back"))
        if commits and chance.random() < 0.3:
            await wait_for(manager, history, transaction, token)


async def wait_for(manager: SyncManager, history: History, wait: str, token: SyncToken) -> None:
    history.write(said.Waiting(wait=wait, positions=token.positions, backend_ids=token.backend_ids))
    result = await manager.wait_for_sync(token, timeout=5)
    done = [status.backend_id for status in result if status.synced]
    history.write(said.Told(wait=wait, done=done))


def changes(chance: random.Random, name: str) -> Iterator[SyncEvent]:
    for key in chance.sample(range(12), 3):
        tenant = "acme" if key % 2 else "other"
        if chance.random() < 0.2:
            yield SyncEvent.delete("Thing", f"k{key}", tenant_id=tenant)
        else:
            yield SyncEvent.update("Thing", f"k{key}", f'{{"by":"{name}"}}', tenant_id=tenant)


@pytest.fixture
async def path(primary: AsyncEngine, tmp_path: Path) -> Path:
    """The history of a run with two writers and two relays."""
    path, chance = tmp_path / "history.jsonl", random.Random(SEED)
    with History(path, process="all") as history:
        secondaries = [TellingSecondary(name, history, chance) for name in ("index", "cache")]
        manager = manager_of(primary, *secondaries, batch_size=5)
        await manager.register()
        async with running(manager.relay(), manager.relay()):
            async with asyncio.TaskGroup() as group:
                for writer in ("one", "two"):
                    group.create_task(write_some(manager, history, writer, random.Random(writer)))
            for secondary in secondaries:
                secondary.failing = 0.0
            # What failed is tried again later, which no drain waits for.
            await eventually(lambda: value(primary, "select sum(pending) = 0 from outbox_lag"))
        history.write(said.Drained())
        await dump_tables(primary, "public", history)
        for secondary in secondaries:
            await dump_secondary(secondary, PLACES, history)
        history.write(said.Dumped(rows=False))
    return path


async def test_nothing_is_wrong_with_what_really_happens(path: Path) -> None:
    report = check(Recording(path))
    assert [line for line in report.lines() if "invalid" in line] == []
    for name in ("lost", "phantom", "altered", "cross-tenant", "regressed", "order", "waited early", "wrongly pruned"):
        assert report[name].answer is Answer.VALID, name
    for name in ("counts", "equality", "convergence", "vacuity"):
        assert report[name].answer is Answer.VALID, name
    assert report["counts"].counts["checked"] == 2


async def test_the_loss_of_every_effect_is_seen(path: Path) -> None:
    """A history without a single effect is no history in which everything arrived."""
    records = [each for each in Recording(path) if not isinstance(each, (said.Applied, said.Told))]
    report: Report = check(records)
    assert report["lost"].answer is Answer.INVALID
    assert report["lost"].counts["anomalies"] > 100


async def test_a_dump_shows_what_is_owed(primary: AsyncEngine, tmp_path: Path) -> None:
    """Deliveries, an open attempt and a dead key are there, each once, and nothing else is."""
    manager = manager_of(primary, MemorySecondary("index"))
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(*(SyncEvent.update("Thing", f"k{number}", "{}", tenant_id="acme") for number in range(3)))
    with History(tmp_path / "history", process="dump") as history:
        await dump_tables(primary, "public", history)
        await execute(primary, "delete from outbox_delivery where event_id = (select min(event_id) from outbox)")
        await dump_tables(primary, "public", history)
    owed = [each.positions for each in Recording(tmp_path / "history") if isinstance(each, said.Owed)]
    assert [len(positions) for positions in owed] == [3, 2]
