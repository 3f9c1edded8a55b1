"""Carrier: the loop of one secondary. Claim, dispatch, settle; several attempts in flight."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from outbox.attempt import Attempt, Lost, Released
from outbox.breaker import allowance, ease, probe, trip
from outbox.claim import claim
from outbox.dispatch import Dispatched, dispatch
from outbox.lanes import Lanes, advance_floors
from outbox.lease import expired
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.prune import fold
from outbox.register import Registration
from outbox.resume import resume
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Applied, Rejected, Retry, Stale
from outbox.settings import SyncConfig
from outbox.settle import settle
from outbox.turn import Turn, take_turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Carrier", "InHand"]

_log = logging.getLogger("outbox.relay")

_SHORTEST_SLEEP = 0.002
_LOOK_EVERYWHERE_EVERY = 60.0
_RAISE_FLOORS_EVERY = 0.25
_HANDING_BACK = 5.0
# The claim that looks at holds costs a fixed millisecond more; between two of them held keys are passed by.
_RESUME_EVERY = 0.02
_ANSWERED = (Applied, Stale, Retry, Rejected)


class InHand(NamedTuple):
    """An attempt and the task that is dispatching it."""

    attempt: Attempt
    dispatching: asyncio.Task[Dispatched]


class Carrier:
    """Carries what is owed to one secondary, for one relay."""

    def __init__(
        self, registration: Registration, primary: Primary, config: SyncConfig, policy: RetryPolicy, relay_id: UUID
    ) -> None:
        self.secondary = registration.secondary
        self.backend_id = registration.backend_id
        self.in_flight: dict[int, InHand] = {}
        self._primary = primary
        self._config = config
        self._policy = policy
        self._relay_id = relay_id
        self._lanes = Lanes()
        self._bell = asyncio.Event()
        self._carrying: set[asyncio.Task[int]] = set()
        self._defect: BaseException | None = None
        self._stopping = False
        self._strained = False
        self._alone = False
        self._alone_out = False
        self._resume_at = self._raise_floors_at = 0.0
        self._look_everywhere_at = time.monotonic() + _LOOK_EVERYWHERE_EVERY

    async def run(self) -> None:
        """Carry until told to stop. A primary that fails is waited for; nothing is lost meanwhile."""
        sleep, failures = _SHORTEST_SLEEP, 0
        while not self._stopping:
            self._raise_defect()
            self._bell.clear()
            try:
                attempts = await self._claim(room) if (room := await self._worthwhile_room()) else []
            except PRIMARY_FAILED as error:
                _log.warning("%s: claim failed (%s)", self.backend_id, code_of(error))
                failures += 1
                await self._pause(failures)
                continue
            failures = 0
            for attempt in attempts or ():
                self._start(attempt)
            if attempts and time.monotonic() >= self._raise_floors_at:
                await self._raise_floors()
            if attempts or await self._rung(sleep):
                sleep = _SHORTEST_SLEEP
            else:
                sleep = min(sleep * 2, self._config.poll_interval.total_seconds())

    async def run_once(self) -> int:
        """Carry one batch; return how many deliveries it held, 0 when nothing was due."""
        while (attempts := await self._claim(1)) is None:
            await self._rung(_SHORTEST_SLEEP)
        return sum([await self._start(attempt) for attempt in attempts])

    def ring(self) -> None:
        """Look again at once instead of at the next poll."""
        self._bell.set()

    def stop(self) -> None:
        """Claim no more: `run` ends after the claim it may be in."""
        self._stopping = True
        self.ring()

    async def finish(self, grace: float) -> None:
        """Let what is out finish for `grace` seconds, then hand it back with no attempt spent."""
        if not (carrying := set(self._carrying)):
            return
        await asyncio.wait(carrying, timeout=grace)
        self.give_up(set(self.in_flight))
        _, stuck = await asyncio.wait(carrying, timeout=_HANDING_BACK)
        # The primary is away, or the adapter will not be cancelled: the leases run out.
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)

    def give_up(self, attempt_ids: set[int]) -> None:
        """Stop dispatching these attempts; settling them hands back what is still ours."""
        for attempt_id in attempt_ids & self.in_flight.keys():
            self.in_flight[attempt_id].dispatching.cancel()

    async def tidy(self) -> None:
        """Fold finished attempts, raise the floors, and now and then look below them."""
        async with self._primary.connection() as connection:
            await fold(connection, self._config.database_schema, self.backend_id)
            await advance_floors(connection, self._config.database_schema, self.backend_id, self._lanes)
        if time.monotonic() >= self._look_everywhere_at:
            self._lanes.look_everywhere()
            self._look_everywhere_at = time.monotonic() + _LOOK_EVERYWHERE_EVERY

    async def _claim(self, slots: int) -> list[Attempt] | None:
        """Open attempts; an empty list says that nothing is due, None that it is worth looking again."""
        schema, backend_id = self._config.database_schema, self.backend_id
        async with self._primary.connection() as connection, connection.transaction():
            turn = await take_turn(connection, schema, backend_id)
            if turn is None:
                return None
            if turn.status in ("paused", "removed"):
                return []
            lost = await self._lost(connection, turn) if turn.lost_attempts else []
            if not lost:
                return await self._claim_in_turn(connection, turn, slots)
        # Settled outside the turn, each by its own fence: whoever else found them loses.
        for attempt in lost:
            _log.warning("%s: taking over attempt %d, whose lease ran out", backend_id, attempt.attempt_id)
            await self._settle(attempt, Dispatched(attempt.alike(Lost())), expired=True)
        self.ring()
        return None

    async def _raise_floors(self) -> None:
        """Keep the scans of a busy relay short: what it has delivered is soon more than what it claims."""
        self._raise_floors_at = time.monotonic() + _RAISE_FLOORS_EVERY
        with suppress(*PRIMARY_FAILED):
            async with self._primary.connection() as connection:
                await advance_floors(connection, self._config.database_schema, self.backend_id, self._lanes)

    async def _lost(self, connection: asyncpg.Connection[Any], turn: Turn) -> list[Attempt]:
        """Return what others left behind; what this relay has in hand it still knows the end of."""
        schema, backend_id = self._config.database_schema, self.backend_id
        found = await expired(connection, schema, backend_id, turn.folded_through, log_order=turn.log_order)
        return [attempt for attempt in found if attempt.attempt_id not in self.in_flight]

    async def _claim_in_turn(self, connection: asyncpg.Connection[Any], turn: Turn, slots: int) -> list[Attempt]:
        room = allowance(turn, self._config.batch_size)
        self._strained = turn.breaker != "closed" or turn.breaker_failures > 0 or turn.breaker_ramp is not None
        if room == 0 or (self._strained and self.in_flight):
            return []
        parameters: dict[str, Any] = {
            "backend_id": self.backend_id,
            "relay_id": self._relay_id,
            "turn": turn,
            "batch_size": room,
            "lanes": self._lanes,
            "lease": self._config.lease,
        }
        schema, now = self._config.database_schema, time.monotonic()
        attempts: list[Attempt] = []
        if turn.holds and (now >= self._resume_at or turn.breaker != "closed"):
            self._resume_at = now + _RESUME_EVERY
            # Suspects take turns with everybody else, so that many of them delay nobody for long.
            self._alone = turn.suspects and not self._alone
            if self._alone and self.in_flight:
                self._alone = False
                return []
            resumed = await resume(connection, schema, **parameters, alone=self._alone)
            attempts = [resumed] if resumed else []
            self._alone_out = self._alone and resumed is not None
        if not attempts:
            attempts = await claim(connection, schema, **parameters, slots=1 if self._strained else slots)
        if attempts and turn.breaker != "closed":
            await probe(connection, self._config.database_schema, self.backend_id, self._config.lease)
        return attempts

    def _start(self, attempt: Attempt) -> asyncio.Task[int]:
        dispatching = asyncio.create_task(dispatch(self.secondary, attempt, self._config.attempt_deadline))
        self.in_flight[attempt.attempt_id] = InHand(attempt, dispatching)
        carrying = asyncio.create_task(self._carry(attempt, dispatching))
        self._carrying.add(carrying)
        carrying.add_done_callback(self._carried)
        return carrying

    async def _carry(self, attempt: Attempt, dispatching: asyncio.Task[Dispatched]) -> int:
        try:
            await asyncio.wait({dispatching})
        except asyncio.CancelledError:
            dispatching.cancel()
            async with asyncio.timeout(_HANDING_BACK):
                await asyncio.wait({dispatching})
                await self._settle(attempt, Dispatched(attempt.alike(Released())))
            raise
        else:
            cut_off = dispatching.cancelled()
            dispatched = Dispatched(attempt.alike(Released())) if cut_off else dispatching.result()
            await self._settle(attempt, dispatched)
        finally:
            # Its lease is kept until it is settled: what is known to be done must not be lost with the primary away.
            self.in_flight.pop(attempt.attempt_id, None)
        return len(attempt.events)

    def _carried(self, carrying: asyncio.Task[int]) -> None:
        self._carrying.discard(carrying)
        if not carrying.cancelled() and (error := carrying.exception()) is not None:
            self._defect = error
        # Its keys are free again, and there is room for another attempt.
        self.ring()

    async def _settle(self, attempt: Attempt, dispatched: Dispatched, *, expired: bool = False) -> None:
        """Record the outcome, however often the primary goes away; the fence tells whether it was still ours."""
        unavailable = dispatched.unavailable
        for failures in itertools.count(1):
            try:
                async with self._primary.connection() as connection:
                    ours = await settle(
                        connection,
                        self._config.database_schema,
                        self._relay_id,
                        attempt,
                        dispatched.results,
                        self._policy,
                        error_code=unavailable.code if unavailable else None,
                        expired=expired,
                    )
                    if ours:
                        await self._mind_breaker(connection, dispatched)
                break
            except PRIMARY_FAILED as error:
                _log.warning("%s: settle failed (%s)", self.backend_id, code_of(error))
                await self._pause(failures)
        if not ours:
            _log.warning("%s: attempt %d was no longer ours; dropped", self.backend_id, attempt.attempt_id)

    async def _pause(self, failures: int) -> None:
        """Wait for the primary, and longer from failure to failure: what can never work must not be tried in a spin."""
        await asyncio.sleep(_SHORTEST_SLEEP * 4 ** min(failures, 7) / 4)
        await self._primary.wait()

    async def _mind_breaker(self, connection: asyncpg.Connection[Any], dispatched: Dispatched) -> None:
        schema, unavailable = self._config.database_schema, dispatched.unavailable
        if unavailable is not None:
            await trip(connection, schema, self.backend_id, self._config, unavailable.retry_after)
            self._strained = True
        elif self._strained and any(isinstance(each, _ANSWERED) for each in dispatched.results):
            await ease(connection, schema, self.backend_id, self._config.batch_size)

    async def _worthwhile_room(self) -> int:
        """Wait a moment for half of the slots to be free: claims share their fixed cost among the slots they fill."""
        enough, deadline = self._config.attempts_in_flight // 2, time.monotonic() + _SHORTEST_SLEEP
        while 0 < self._room() < enough and (left := deadline - time.monotonic()) > 0:
            await self._rung(left)
            self._bell.clear()
        return self._room()

    def _room(self) -> int:
        # A suspect may take its process with it: nothing goes out beside it.
        if self._alone_out and self._carrying:
            return 0
        return self._config.attempts_in_flight - len(self._carrying)

    async def _rung(self, sleep: float) -> bool:
        try:
            async with asyncio.timeout(sleep if self._room() else None):
                await self._bell.wait()
        except TimeoutError:
            return False
        return True

    def _raise_defect(self) -> None:
        if self._defect is not None:
            raise self._defect
