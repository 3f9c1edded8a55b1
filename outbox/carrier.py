"""Carrier: the loop of one secondary. It claims what there are hands for, and raises the floors of its lanes."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import Attempt, Lost
from outbox.dispatch import Dispatched
from outbox.epoch import Vigil
from outbox.floors import Floors
from outbox.hands import Hands, Opened
from outbox.lease import expired
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.register import Registration
from outbox.retry import RetryPolicy
from outbox.seize import seize
from outbox.settings import SyncConfig
from outbox.taking import Taking
from outbox.turn import Turn, say_looked, set_back, take_turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Carrier"]

_log = logging.getLogger("outbox.relay")

_SHORTEST_SLEEP = 0.002
_LONGEST_PATIENCE = 0.02
_SLOW = 0.05
# A statement that took too long says nothing about the primary's history.
_CANCELED = "57014"


class Carrier:
    """Carries what is owed to one secondary, for one relay."""

    def __init__(
        self, registration: Registration, primary: Primary, config: SyncConfig, policy: RetryPolicy, relay_id: UUID
    ) -> None:
        self.backend_id = registration.backend_id
        self.hands = Hands(registration, primary, config, policy, relay_id, self._freed)
        self._primary = primary
        self._config = config
        self._relay_id = relay_id
        self._floors = Floors(primary, config, registration.backend_id)
        self._vigil = Vigil(self.backend_id)
        self._bell = asyncio.Event()
        self._stopping = False
        self._taking = Taking(self.hands, config, self.backend_id, relay_id, self._floors.lanes, self.ring)
        self._took = self._say_looked_at = self._look_back_at = 0.0

    async def run(self) -> None:
        """Carry until told to stop. A primary that fails is waited for; nothing is lost meanwhile."""
        sleep, failures = _SHORTEST_SLEEP, 0
        while not self._stopping:
            self.hands.raise_defect()
            rung = self._bell.is_set()
            self._bell.clear()
            try:
                attempts = await self._look(rung=rung)
            except PRIMARY_FAILED as error:
                code = code_of(error)
                extra = {"outbox_backend_id": self.backend_id, "outbox_error_code": code}
                _log.warning("%s: claim failed (%s)", self.backend_id, code, extra=extra)
                failures, self._say_looked_at = failures + 1, 0.0
                if code != _CANCELED:
                    self.doubt()
                await self._primary.recover(failures)
                continue
            failures = 0
            for attempt in attempts or ():
                self.hands.take(attempt)
            await self._floors.mind(busy=bool(attempts))
            await self._mind_history()
            if not attempts and self._took > _SLOW:
                # To find nothing took long: whoever rings all the time must not keep it going all the time.
                await asyncio.sleep(min(self._took, 1.0))
            if attempts:
                sleep = _SHORTEST_SLEEP
            # What came with less than was asked for leaves nothing behind: another claim would only be in its way.
            if (attempts and self._floors.lanes.more) or await self._rung(sleep):
                sleep = _SHORTEST_SLEEP
            else:
                sleep = min(sleep * 2, self._config.poll_interval.total_seconds())

    async def _look(self, *, rung: bool) -> list[Opened] | None:
        """Claim for the hands that are free, if there can be anything, and remember how long that took."""
        if not (room := await self._worthwhile_room()):
            return []
        started = time.monotonic()
        try:
            if not rung and started < self._say_looked_at and await self._floors.at_rest():
                return []
            return await self._claim(room)
        finally:
            self._took = time.monotonic() - started

    async def run_once(self) -> int:
        """Carry one batch; return how many deliveries it held, 0 when nothing was due."""
        # Held keys count as due here, however short ago they were looked at, and a whole batch is wanted.
        self._taking.resume_at, self._floors.lanes.more = 0.0, True
        while (attempts := await self.hands.claimed(self._claim(1))) is None:
            await self._rung(_SHORTEST_SLEEP)
        carrying = [self.hands.take(attempt) for attempt in attempts]
        await self._floors.mind(busy=bool(attempts))
        await self._mind_history()
        return sum([await each for each in carrying])

    async def seize(self, positions: Sequence[int], until: float) -> int:
        """Carry these events now, for a caller who waits for them; return how many were in hand, 0 if none could be.

        Waits for its turn until the loop's clock says `until`.
        """
        attempts: list[Opened] | None = None
        while attempts is None:
            # Looked at before every claim: what is claimed while we close may find nobody who hands it back.
            if self._stopping or time.monotonic() >= until:
                return 0
            if (attempts := await self._seize(positions)) is None:
                await asyncio.sleep(_SHORTEST_SLEEP)
        carrying = [self.hands.take(attempt) for attempt in attempts]
        if self._stopping:
            self.hands.give_up({attempt.attempt_id for attempt in attempts})
        await self._floors.mind(busy=True)
        return sum([await each for each in carrying])

    def ring(self) -> None:
        """Look again at once instead of at the next poll."""
        self._bell.set()

    def stop(self) -> None:
        """Claim no more: `run` ends after the claim it may be in."""
        self._stopping = True
        self.ring()

    async def _claim(self, slots: int) -> list[Opened] | None:
        """Open attempts; an empty list says that nothing is due, None that it is worth looking again."""
        schema, backend_id = self._config.database_schema, self.backend_id
        quiet, self._floors.rested_through = self._floors.lanes.quiet, None
        async with self._floors.connection() as connection, connection.transaction():
            turn = await take_turn(connection, schema, backend_id)
            if turn is None:
                return None
            # What is less is over in a lease, and a clock may be corrected a little at any time.
            if turn.ahead > self._config.lease:
                back = turn.ahead.total_seconds()
                fields = {"outbox_backend_id": backend_id}
                _log.warning("%s: the primary's clock was set back by %.0f s", backend_id, back, extra=fields)
                await set_back(connection, schema, backend_id, turn)
                return None
            await self._say_looked(connection)
            if self._withheld(turn):
                return []
            lost = await self._lost(connection, turn) if turn.lost_attempts else []
            if not lost:
                attempts = await self._taking.take(connection, turn, slots)
                self._floors.rested_through = quiet if turn.at_rest and not attempts else None
                return attempts
        # Settled outside the turn, each by its own fence: whoever else found them loses.
        for attempt in lost:
            taken: dict[str, object] = {"outbox_backend_id": backend_id, "outbox_attempt_id": attempt.attempt_id}
            _log.warning("%s: taking over attempt %d, whose lease ran out", backend_id, attempt.attempt_id, extra=taken)
            await self.hands.settle(attempt, Dispatched(attempt.alike(Lost())), expired=True)
        self.ring()
        return None

    async def _say_looked(self, connection: asyncpg.Connection[Any]) -> None:
        """In the claim's own transaction: a loop that stands still or fails says nothing, whatever else goes on."""
        if (now := time.monotonic()) >= self._say_looked_at:
            silence, every = self._config.unhealthy_after_silence, self._config.prune_interval
            every = min(every, silence / 3) if silence else every
            await say_looked(connection, self._config.database_schema, self.backend_id, every)
            self._say_looked_at = now + every.total_seconds()

    async def _seize(self, positions: Sequence[int]) -> list[Opened] | None:
        """Open an attempt of these events; an empty list says that none can be taken, None that it is not our turn."""
        schema, backend_id = self._config.database_schema, self.backend_id
        async with self._floors.connection() as connection, connection.transaction():
            turn = await take_turn(connection, schema, backend_id)
            if turn is None:
                return None
            self.hands.mind_strain(turn)
            if self._withheld(turn) or self.hands.strained:
                # Whether the secondary is there again is for a relay to find out, one probe at a time.
                return []
            attempt_id = await seize(
                connection,
                schema,
                backend_id=backend_id,
                relay_id=self._relay_id,
                turn=turn,
                event_ids=positions,
                batch_size=self._config.batch_size,
                floors=self._floors.lanes.floors,
                lease=self._config.lease,
            )
        return [] if attempt_id is None else [Opened(attempt_id, turn.log_order, held=False)]

    def doubt(self) -> None:
        """Take nothing of what is known of the primary for granted: its history may have gone back."""
        self.hands.ahead.doubt()
        self._floors.lanes.look_everywhere()

    def _withheld(self, turn: Turn) -> bool:
        if turn.beyond:
            # It is asked again once its registry row says that positions were moved past what it holds.
            self.hands.ahead.doubt()
        return turn.beyond or turn.status in ("paused", "removed")

    async def _mind_history(self) -> None:
        """Look now and then whether the primary is still the one it was."""
        if (now := time.monotonic()) < self._look_back_at:
            return
        self._look_back_at = now + self._config.prune_interval.total_seconds()
        # A role that may not see the epoch carries all the same: positions tell the worst of it.
        with suppress(*PRIMARY_FAILED):
            async with self._primary.connection() as connection:
                if await self._vigil.went_back(connection, self._config.database_schema):
                    self.doubt()

    async def _lost(self, connection: asyncpg.Connection[Any], turn: Turn) -> list[Attempt]:
        """Return what others left behind; what this relay has in hand it still knows the end of."""
        schema, backend_id = self._config.database_schema, self.backend_id
        found = await expired(connection, schema, backend_id, turn.folded_through, log_order=turn.log_order)
        return [attempt for attempt in found if attempt.attempt_id not in self.hands.attempt_ids]

    async def _worthwhile_room(self) -> int:
        """Wait for half of the slots, which share a claim's fixed cost, for as long as the last claim took at most."""
        patience = min(max(self._took, _SHORTEST_SLEEP), _LONGEST_PATIENCE)
        enough, deadline = self._config.attempts_in_flight // 2, time.monotonic() + patience
        while 0 < self._room() < enough and (left := deadline - time.monotonic()) > 0:
            await self._rung(left)
            self._bell.clear()
        return self._room()

    def _room(self) -> int:
        return 0 if self._taking.suspects.block(self.hands.attempt_ids) else self.hands.room

    def _freed(self) -> None:
        self._taking.suspects.freed(self.hands.attempt_ids)
        self.ring()

    async def _rung(self, sleep: float) -> bool:
        try:
            async with asyncio.timeout(sleep if self._room() else None):
                await self._bell.wait()
        except TimeoutError:
            return False
        return True
