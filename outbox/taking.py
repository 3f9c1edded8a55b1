"""Taking: what one relay takes for one secondary when it has the turn: held keys now and then, else what is fresh."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.attempt import Attempt
from outbox.breaker import allowance, probe
from outbox.claim import FEW, claim, claim_few
from outbox.hands import Hands, Opened
from outbox.lanes import Lanes
from outbox.settings import SyncConfig
from outbox.suspects import Suspects
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Taking"]

# The claim that looks at holds fills one batch and not several; between two of them held keys are passed by. While
# there is other work it takes one of so many parts of the time, unless held keys would wait for it too long.
_RESUME_EVERY, _RESUME_PART, _RESUME_LATEST = 0.02, 20, 1.0


class Taking:
    """Opens attempts for one relay in its turn; its lanes know whether the last one left anything."""

    def __init__(
        self, hands: Hands, config: SyncConfig, backend_id: str, relay_id: UUID, lanes: Lanes, ring: Callable[[], None]
    ) -> None:
        self.suspects = Suspects()
        self.resume_at = 0.0
        self._hands = hands
        self._config = config
        self._backend_id = backend_id
        self._relay_id = relay_id
        self._lanes = lanes
        self._ring = ring

    async def take(self, connection: asyncpg.Connection[Any], turn: Turn, slots: int) -> list[Opened] | None:
        """Open attempts; an empty list says that nothing is due, None that it is worth looking again."""
        room = allowance(turn, self._config.batch_size)
        self._hands.mind_strain(turn)
        if room == 0 or (self._hands.strained and self._hands.attempt_ids):
            return []
        now = time.monotonic()
        attempts: list[Opened] | None = []
        if turn.holds and (now >= self.resume_at or turn.breaker != "closed"):
            attempts = await self._resume(connection, turn, room, now)
            if attempts is None:
                return []
            if not attempts and not self.resume_at:
                # Holds took so much that they are to be looked at once more.
                return None
        if not attempts:
            attempts = await self._claim(connection, turn, room, 1 if self._hands.strained else slots)
            if not attempts:
                self.resume_at = min(self.resume_at, now + _RESUME_EVERY)
        if attempts and turn.breaker != "closed":
            await probe(connection, self._config.database_schema, self._backend_id, self._config.lease)
        return attempts

    async def _resume(
        self, connection: asyncpg.Connection[Any], turn: Turn, room: int, now: float
    ) -> list[Opened] | None:
        """Open an attempt of what is held and due; None while all wait for something that is in hand."""
        schema, in_hand = self._config.database_schema, self._hands.attempt_ids
        resumed = await self.suspects.resume(connection, schema, in_hand, **self._terms(turn), batch_size=room)
        if resumed is None:
            return None
        took = time.monotonic() - now
        self.resume_at = now + min(max(_RESUME_EVERY, took * _RESUME_PART), _RESUME_LATEST)
        self._lanes.more = True
        if resumed.absorbed * 2 >= room:
            # A long line at once: until holds have it, every claim would walk past it.
            self.resume_at = 0.0
            self._ring()
        return [Opened(resumed.attempt_id, turn.log_order, held=True)] if resumed.attempt_id else []

    async def _claim(self, connection: asyncpg.Connection[Any], turn: Turn, room: int, slots: int) -> list[Opened]:
        """Open attempts of what is fresh. After a claim that left nothing there are only few: they come at once."""
        schema, terms = self._config.database_schema, self._terms(turn)
        opened: Sequence[tuple[int, Attempt | None]]
        if not self._lanes.more and self._lanes.taken <= FEW:
            most = min(room, FEW)
            opened = await claim_few(connection, schema, **terms, batch_size=most, batch_bytes=self._config.batch_bytes)
        else:
            ids = await claim(connection, schema, **terms, batch_size=room, slots=slots)
            opened = [(attempt_id, None) for attempt_id in ids]
        return [Opened(attempt_id, turn.log_order, held=False, loaded=attempt) for attempt_id, attempt in opened]

    def _terms(self, turn: Turn) -> dict[str, Any]:
        return {
            "backend_id": self._backend_id,
            "relay_id": self._relay_id,
            "turn": turn,
            "lanes": self._lanes,
            "lease": self._config.lease,
        }
