"""Hand: what a relay does with one secondary, statement by statement, as its carrier and hands do it."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg

from outbox import SyncEvent, record
from outbox.attempt import Attempt, Lost
from outbox.claim import claim
from outbox.dispatch import Dispatched, dispatch
from outbox.lanes import Lanes, advance_floors
from outbox.lease import expired
from outbox.load import load
from outbox.prune import fold, prune_attempts, prune_events
from outbox.resume import resume
from outbox.seize import seize
from outbox.settle import settle
from outbox.turn import Turn, take_turn
from tests.interleavings.stage import MIRROR, POLICY
from tests.scripted import ScriptedSecondary

LONG = timedelta(minutes=1)


class Hand:
    """One relay's way with the secondary. A step that has nothing to do does nothing."""

    def __init__(self, connection: asyncpg.Connection[Any], secondary: ScriptedSecondary, **terms: Any) -> None:
        self.connection = connection
        self.secondary = secondary
        self.relay_id = uuid4()
        self.lanes = Lanes()
        self.lease: timedelta = terms.get("lease", LONG)
        self.batch_size: int = terms.get("batch_size", 100)
        self.slots: int = terms.get("slots", 1)
        self.taken: Turn | None = None
        self.opened: list[int] = []
        self.attempts: list[Attempt] = []
        self.outcomes: list[Dispatched] = []
        self.lost: list[Attempt] = []
        self.counted: list[bool] = []
        self._transaction: Any = None

    async def begin(self) -> None:
        self._transaction = self.connection.transaction()
        await self._transaction.start()

    async def commit(self) -> None:
        await self._transaction.commit()

    async def turn(self) -> None:
        """Begin, and take the secondary's turn unless somebody has it."""
        await self.begin()
        self.taken = await take_turn(self.connection, "public", MIRROR)

    async def claim(self) -> None:
        if self.taken is not None:
            terms = self._terms(self.taken) | {"slots": self.slots}
            self.opened = await claim(self.connection, "public", **terms, lanes=self.lanes)

    async def resume(self) -> None:
        """Take what is held and due; a suspect goes first, and alone."""
        if self.taken is not None:
            terms = self._terms(self.taken) | {"alone": self.taken.suspects}
            found = await resume(self.connection, "public", **terms, lanes=self.lanes)
            self.opened = [] if found.attempt_id is None else [found.attempt_id]

    async def seize(self, *positions: int) -> None:
        if self.taken is not None:
            terms = self._terms(self.taken) | {"event_ids": positions, "floors": self.lanes.floors}
            found = await seize(self.connection, "public", **terms)
            self.opened = [] if found is None else [found]

    async def load(self) -> None:
        """Fetch what was opened and hand it to the secondary, which is outside of any transaction."""
        terms: dict[str, Any] = {"backend_id": MIRROR, "relay_id": self.relay_id, "held": True, "batch_bytes": 2**24}
        self.attempts, self.outcomes = [], []
        for attempt_id in self.opened:
            assert self.taken is not None
            found = await load(
                self.connection, "public", **terms, attempt_id=attempt_id, log_order=self.taken.log_order
            )
            if found is not None:
                self.attempts.append(found)
                self.outcomes.append(await dispatch(self.secondary, found, LONG))
        self.opened = []

    async def settle(self) -> None:
        """Begin, and settle what came back; `counted` says of each attempt whether it was still ours."""
        await self.begin()
        for attempt, outcome in zip(self.attempts, self.outcomes, strict=True):
            settled = await settle(self.connection, "public", self.relay_id, attempt, outcome.results, POLICY)
            self.counted.append(settled is not None)

    async def find_lost(self) -> None:
        """Take the turn, look for attempts that outlived their lease, and end the turn, as a claim does."""
        async with self.connection.transaction():
            turn = await take_turn(self.connection, "public", MIRROR)
            if turn is not None and turn.lost_attempts:
                self.lost = await expired(
                    self.connection, "public", MIRROR, turn.folded_through, log_order=turn.log_order
                )

    async def take_over(self) -> None:
        """Begin, and settle what was lost, by its own fence."""
        await self.begin()
        for attempt in self.lost:
            results = attempt.alike(Lost())
            await settle(self.connection, "public", self.relay_id, attempt, results, POLICY, expired=True)
        self.lost = []

    async def raise_floors(self) -> None:
        await advance_floors(self.connection, "public", MIRROR, self.lanes)

    async def carry(self) -> None:
        """Claim, load and settle one batch at once, held keys first."""
        await self.turn()
        await self.resume()
        await self.commit()
        await self.load()
        await self.settle()
        await self.commit()

    def _terms(self, turn: Turn) -> dict[str, Any]:
        return {
            "backend_id": MIRROR,
            "relay_id": self.relay_id,
            "turn": turn,
            "batch_size": self.batch_size,
            "lease": self.lease,
        }


class Writer:
    """An application: changes its row, records the event, and commits or not."""

    def __init__(self, connection: asyncpg.Connection[Any], event: SyncEvent, ending: str = "commit") -> None:
        self.connection = connection
        self.event = event
        self.position: int | None = None
        self.changed = True
        self._ending = ending
        self._transaction: Any = None

    async def begin(self) -> None:
        self._transaction = self.connection.transaction()
        await self._transaction.start()

    async def change(self) -> None:
        """Begin, and write the business row: whoever else writes it waits here."""
        await self.begin()
        await self.write()

    async def write(self) -> None:
        event = self.event
        if event.content is None:
            done = await self.connection.execute(
                "delete from note where tenant_id = $1 and number = $2", event.tenant_id, event.resource_id
            )
            # Behind somebody who deleted it, and inserted it anew, nothing is deleted: then there is nothing to record.
            self.changed = done != "DELETE 0"
            return
        await self.connection.execute(
            "insert into note values ($1, $2, $3) on conflict (tenant_id, number) do update set content = $3",
            event.tenant_id,
            event.resource_id,
            event.content,
        )

    async def record(self) -> None:
        """Record the event, in a transaction of its own steps."""
        if self._transaction is None:
            await self.begin()
        if not self.changed:
            return
        token = await record(self.connection, [self.event])
        (self.position,) = token.positions
        self.token = token

    async def end(self) -> None:
        """Commit, or roll back."""
        await (self._transaction.commit() if self._ending == "commit" else self._transaction.rollback())

    @property
    def commits(self) -> bool:
        return self._ending == "commit"


class Pruner:
    """Prunes everything that is owed to nobody, in a transaction of its own."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self._transaction: Any = None

    async def begin(self) -> None:
        self._transaction = self.connection.transaction()
        await self._transaction.start()

    async def events(self) -> None:
        await self.begin()
        await prune_events(self.connection, "public", timedelta(0), 0)

    async def fold(self) -> None:
        await self.begin()
        await fold(self.connection, "public", MIRROR)

    async def attempts(self) -> None:
        await prune_attempts(self.connection, "public", timedelta(0), {})

    async def end(self) -> None:
        await self._transaction.commit()
