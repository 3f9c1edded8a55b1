"""The real side of the model test: one database for all examples, moody secondaries, relays that go step by step."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from math import inf
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy.ext.asyncio import create_async_engine
from tenacity import stop_after_attempt, wait_fixed

from outbox import Registration, RetryPolicy, SyncEvent, SyncManager
from outbox.attempt import Attempt, Lost, Released, Superseded
from outbox.carrier import Carrier
from outbox.dispatch import Dispatched
from outbox.errors import Unavailable
from outbox.hands import Opened, _InHand
from outbox.primary import Primary
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale
from tests.comparing import Base, Note
from tests.model.model import MOST_ATTEMPTS, Key
from tests.relaying import quick
from tests.scripted import Broken, ScriptedSecondary, Step, position_of

BATCHES = {"small": 2, "large": 100}
"""Two relays and how many events each takes at once."""

# Nothing comes by itself: leases run out, holds fall due and breakers may be probed when a step of the machine says so.
_AN_HOUR = timedelta(hours=1)
_POLICY = RetryPolicy(wait_fixed(3600), stop_after_attempt(MOST_ATTEMPTS), _AN_HOUR)
_STILL = {
    "lease": _AN_HOUR,
    "attempt_deadline": _AN_HOUR,
    "statement_timeout": _AN_HOUR,
    "prune_interval": _AN_HOUR,
    "breaker_initial": _AN_HOUR,
    "breaker_max": _AN_HOUR,
    "retry_max": _AN_HOUR,
    "unhealthy_after_silence": None,
}
FORGETFUL = quick(**_STILL, keep_events=timedelta(microseconds=1), keep_attempts=timedelta(microseconds=1))
"""Settings of a relay that keeps nothing longer than it must."""

_TABLES = """
outbox, outbox_delivery, outbox_attempt, outbox_hold, outbox_discarded, outbox_secondary, outbox_backfill,
outbox_reconciliation, note
"""
WORDS = {
    Applied: "applied",
    Stale: "stale",
    Superseded: "superseded",
    Retry: "retried",
    Rejected: "rejected",
    Released: "released",
    Lost: "lost",
}

_STEPS: dict[str, Step] = {
    "retry": Retry("busy"),
    "rejected": Rejected("mapping"),
    "broken": ValueError("no reason given"),
    "answer lost": Broken(ConnectionError("after it was kept")),
}
TROUBLES = ("none", *_STEPS, "nonsense", "down", "half way")
"""What may happen to a batch: the first ones to some keys of it, the last three to the whole."""
_DONE = {"applied", "stale"}
COMES_OF = {
    "none": _DONE,
    "retry": {"retried"},
    "rejected": {"rejected"},
    "broken": {"retried"},
    "answer lost": {"retried"},
    "nonsense": {"retried"},
    "down": {"released"},
    "half way": _DONE | {"released"},
}
WHOLE = ("nonsense", "down", "half way")
REFUSING = WHOLE[1:]


class Moody(ScriptedSecondary):
    """Does to the next batch what it is told."""

    _goes_half_way = False

    def have(self, trouble: str, victims: set[str]) -> None:
        """Let something happen to the next batch, or to these resources of it."""
        self.down = Unavailable("refused", "nobody is there") if trouble == "down" else None
        self._goes_half_way = trouble == "half way"
        self.answer = (lambda outcomes: outcomes[1:]) if trouble == "nonsense" else (lambda outcomes: outcomes)
        for name in victims if trouble in _STEPS else ():
            self.always(name, _STEPS[trouble])

    def recover(self) -> None:
        """Be well again."""
        self.have("none", set())
        self._always.clear()

    async def keep_all(self, events: list[SyncEvent], steps: dict[int | None, Step]) -> list[Outcome]:
        if not self._goes_half_way:
            return await super().keep_all(events, steps)
        known = [self._kept(event, None) for event in events[: len(events) // 2]]
        raise Unavailable("refused", "it went away half way", known=known)

    def positions(self) -> dict[Key, int]:
        """What it holds, deletes included, by position."""
        return {(event.tenant_id, event.resource_id): position_of(event) for event in self.held.values()}

    def contents(self) -> dict[Key, str]:
        """What it shows."""
        held = self.held.values()
        return {(event.tenant_id, event.resource_id): event.content for event in held if event.content is not None}


class InHand:
    """One attempt of one relay, between two steps. It may never get another one, or a late one."""

    def __init__(self, carrier: Carrier, opened: Opened) -> None:
        self.backend_id = carrier.backend_id
        self.carrier = carrier
        self.opened = opened
        self.attempt: Attempt | None = None
        self.dispatched: Dispatched | None = None

    def __repr__(self) -> str:
        return f"{self.backend_id} {self.opened.attempt_id}"

    async def load(self) -> bool:
        """Fetch its events; False if it is somebody else's by now."""
        if self.attempt is None:
            self.attempt = await self.carrier.hands._load(self.opened)
        return self.attempt is not None

    async def dispatch(self) -> dict[int, str]:
        """Hand it over; return what became of each position."""
        assert self.attempt is not None
        self.dispatched = await self.carrier.hands._hand_over(self.attempt)
        return self.results()

    async def settle(self) -> None:
        """Record what became of it, as far as the fence lets it."""
        assert self.attempt is not None
        await self.carrier.hands.settle(self.attempt, self.dispatched or Dispatched(self.attempt.alike(Released())))
        self.drop()

    def drop(self) -> None:
        del self.carrier.hands._in_hand[self.opened.attempt_id]

    def results(self) -> dict[int, str]:
        """The outcomes by position; without a dispatch it is handed back."""
        assert self.attempt is not None
        results = self.dispatched.results if self.dispatched else self.attempt.alike(Released())
        pairs = zip(self.attempt.events, results, strict=True)
        return {position_of(event): WORDS[type(result)] for event, result in pairs}


class Ground:
    """The database, the loop and the connections that all examples share. Each example begins with empty tables."""

    def __init__(self, dsn: str) -> None:
        self.runner = asyncio.Runner()
        self.engine = create_async_engine(dsn)
        self.primary = Primary(self.engine, quick(**_STILL))
        self._dsn = dsn.replace("postgresql+asyncpg", "postgresql")
        self.runner.run(self._open())

    async def _open(self) -> None:
        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        self.looking: asyncpg.Connection[Any] = await asyncpg.connect(self._dsn)
        await self.primary.open()

    async def empty(self) -> None:
        await self.looking.execute(f"truncate {_TABLES} restart identity")

    def close(self) -> None:
        self.runner.run(self._close())
        self.runner.close()

    async def _close(self) -> None:
        await self.looking.close()
        await self.primary.close()
        await self.engine.dispose()

    def manager(self, *registrations: Registration) -> SyncManager:
        manager = SyncManager(self.engine, registrations, config=quick(**_STILL), retry=_POLICY)
        manager.track(Note, tenant=Note.tenant_id, resource_id=Note.number, content=Note.content)
        return manager

    def carrier(self, registration: Registration, relay: str) -> Carrier:
        """What a relay that has just started has for one secondary."""
        config = quick(**_STILL, batch_size=BATCHES[relay])
        return Carrier(registration, self.primary, config, _POLICY, uuid4())

    async def claim(self, carrier: Carrier, slots: int, *, hurries: bool) -> list[InHand]:
        """Claim as the carrier's loop does; what others lost is settled first. In a hurry it passes by what is held."""
        carrier._taking.resume_at = inf if hurries else 0.0
        while (opened := await carrier._claim(slots)) is None:
            continue
        return await self._taken(carrier, opened)

    async def seize(self, carrier: Carrier, positions: list[int]) -> list[InHand]:
        """Claim as a caller does who waits for these."""
        opened = await carrier._seize(positions)
        assert opened is not None, "nobody else had the turn"
        return await self._taken(carrier, opened)

    async def _taken(self, carrier: Carrier, opened: list[Opened]) -> list[InHand]:
        for each in opened:
            carrier.hands._in_hand[each.attempt_id] = _InHand()
        # Floors follow every claim, as close as they may.
        carrier._floors._raised_at = 0.0
        await carrier._floors.mind(busy=True)
        return [InHand(carrier, each) for each in opened]

    async def waiting(self) -> set[tuple[str, int]]:
        return {tuple(row) for row in await self.looking.fetch("select backend_id, event_id from outbox_delivery")}

    async def in_hand(self) -> dict[tuple[str, int], list[int]]:
        sql = "select backend_id, attempt_id, event_ids from outbox_attempt where finished_at is null"
        return {tuple(row[:2]): sorted(row[2]) for row in await self.looking.fetch(sql)}

    async def holds(self) -> dict[tuple[str, Key], tuple[Any, ...]]:
        sql = """
        select backend_id, tenant_id, resource_id, array(
                   select unnest(page.event_ids) from outbox_hold as page
                   where page.backend_id = hold.backend_id and page.key_hash = hold.key_hash order by 1
               ), state, next_attempt_at <= now() as due, attempts, lost, alone
        from outbox_hold as hold
        where page = 0
        """
        return {(row[0], tuple(row[1:3])): tuple(row[3:]) for row in await self.looking.fetch(sql)}

    async def events(self) -> dict[int, tuple[Key, str | None]]:
        rows = await self.looking.fetch("select event_id, tenant_id, resource_id, content from outbox")
        return {row[0]: ((row[1], row[2]), row[3]) for row in rows}

    async def pass_time(self, statement: str, *arguments: Any) -> None:
        """Move what the database compares with its clock."""
        await self.looking.execute(statement, *arguments)
