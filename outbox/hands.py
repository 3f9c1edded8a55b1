"""Hands: what one relay has in hand at one secondary. Load, dispatch, settle; each attempt in a task of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from uuid import UUID

from outbox.ahead import Ahead
from outbox.attempt import Attempt, Refused, Released
from outbox.breaker import ease, trip
from outbox.dispatch import Dispatched, dispatch
from outbox.errors import Unavailable
from outbox.load import contents, load
from outbox.parts import Budget
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.register import Registration
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Applied, Rejected, Retry, Stale
from outbox.settings import SyncConfig
from outbox.settle import Settled, settle
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Hands", "Opened"]

_log = logging.getLogger("outbox.relay")

_T = TypeVar("_T")
_HANDING_BACK = 5.0
_LAST_CLAIM = 0.5
_ANSWERED = (Applied, Stale, Retry, Refused, Rejected)


class Opened(NamedTuple):
    """An attempt that a claim opened; its events are still to be loaded unless the claim came with them."""

    attempt_id: int
    log_order: bool
    held: bool
    loaded: Attempt | None = None


class _InHand:
    """One attempt; it may be given up before it is dispatched, or while it is."""

    def __init__(self) -> None:
        self.given_up = False
        self.dispatching: asyncio.Task[Dispatched] | None = None

    def give_up(self) -> None:
        self.given_up = True
        if self.dispatching is not None:
            self.dispatching.cancel()


class Hands:
    """The attempts in hand. Each is kept, and its lease with it, until it is settled or known to be somebody else's."""

    def __init__(
        self,
        registration: Registration,
        primary: Primary,
        config: SyncConfig,
        policy: RetryPolicy,
        relay_id: UUID,
        freed: Callable[[], None],
    ) -> None:
        self.strained = False
        self.ahead = Ahead(registration.secondary, primary, config)
        self._secondary = registration.secondary
        self._backend_id = registration.backend_id
        self._primary = primary
        self._config = config
        self._policy = policy
        self._relay_id = relay_id
        self._freed = freed
        self._in_hand: dict[int, _InHand] = {}
        self._carrying: set[asyncio.Task[int]] = set()
        self._defect: BaseException | None = None

    @property
    def attempt_ids(self) -> set[int]:
        """The open attempts that this relay knows the end of, or will."""
        return set(self._in_hand)

    @property
    def room(self) -> int:
        """How many attempts more may be taken in hand."""
        return self._config.attempts_in_flight - len(self._carrying)

    def take(self, opened: Opened) -> asyncio.Task[int]:
        """Carry an attempt to its end; the task says how many events were in it."""
        self._in_hand[opened.attempt_id] = _InHand()
        carrying = asyncio.create_task(self._carry(opened))
        self._carrying.add(carrying)
        carrying.add_done_callback(self._carried)
        return carrying

    async def claimed(self, claim: Coroutine[Any, Any, list[Opened] | None]) -> list[Opened] | None:
        """Return what a claim opened; when the caller is cancelled meanwhile it is taken in hand, to be handed back."""
        claiming = asyncio.create_task(claim)
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            # Cut off at its commit, nobody would know of what it opened; a primary that hangs is not waited for.
            await asyncio.wait({claiming}, timeout=_LAST_CLAIM)
            claiming.cancel()
            await asyncio.wait({claiming}, timeout=_LAST_CLAIM)
            if claiming.done() and not claiming.cancelled() and claiming.exception() is None:
                for opened in claiming.result() or ():
                    self.take(opened)
            raise

    def give_up(self, attempt_ids: set[int]) -> None:
        """Stop dispatching these attempts; settling them hands back what is still ours."""
        for attempt_id in attempt_ids & self.attempt_ids:
            self._in_hand[attempt_id].give_up()

    async def finish(self, grace: float) -> None:
        """Let what is out finish for `grace` seconds, then hand it back with no attempt spent."""
        if not (carrying := set(self._carrying)):
            return
        await asyncio.wait(carrying, timeout=grace)
        self.give_up(self.attempt_ids)
        _, stuck = await asyncio.wait(carrying, timeout=_HANDING_BACK)
        # The primary is away, or the adapter will not be cancelled: the leases run out.
        for task in stuck:
            task.cancel()
        if stuck:
            await asyncio.wait(stuck, timeout=_HANDING_BACK)

    async def settle(self, attempt: Attempt, dispatched: Dispatched, *, expired: bool = False) -> None:
        """Record the outcome, however often the primary goes away; the fence tells whether it was still ours."""
        unavailable = dispatched.unavailable
        untold = unavailable
        for failures in itertools.count(1):
            try:
                async with self._primary.connection() as connection:
                    if untold is not None:
                        await self._trip(connection, attempt, untold)
                        untold = None
                    settled = await settle(
                        connection,
                        self._config.database_schema,
                        self._relay_id,
                        attempt,
                        dispatched.results,
                        self._policy,
                        error_code=unavailable.code if unavailable else None,
                        expired=expired,
                    )
                    if settled is not None:
                        self._tell_dead(attempt.attempt_id, settled)
                        await self._ease(connection, dispatched)
                break
            except PRIMARY_FAILED as error:
                code = code_of(error)
                extra = self._fields(attempt.attempt_id) | {"outbox_error_code": code}
                _log.warning("%s: settle failed (%s)", self._backend_id, code, extra=extra)
                await self._primary.recover(failures)
        if settled is None:
            self._drop(attempt.attempt_id)

    def mind_strain(self, turn: Turn) -> None:
        """Note whether the secondary is to be handled with care: it was away, or may be."""
        self.strained = turn.breaker != "closed" or turn.breaker_failures > 0 or turn.breaker_ramp is not None

    def raise_defect(self) -> None:
        """Raise what no attempt may end in: it is a defect of this package."""
        if self._defect is not None:
            raise self._defect

    async def _carry(self, opened: Opened) -> int:
        in_hand = self._in_hand[opened.attempt_id]
        try:
            attempt = opened.loaded or await self._load(opened)
            if attempt is None:
                self._drop(opened.attempt_id)
                return 0
            await self.settle(attempt, await self._dispatch(attempt, in_hand))
        except asyncio.CancelledError:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hand_back(opened, in_hand), timeout=_HANDING_BACK)
            raise
        finally:
            # Its lease is kept until it is settled: what is known to be done must not be lost with the primary away.
            del self._in_hand[opened.attempt_id]
        return len(attempt.events)

    async def _load(self, opened: Opened) -> Attempt | None:
        terms = {"log_order": opened.log_order, "held": opened.held, "batch_bytes": self._config.batch_bytes}
        return await self._fetch(load, opened.attempt_id, **terms)

    async def _contents(self, attempt_id: int, positions: Sequence[int]) -> Mapping[int, str]:
        return await self._fetch(contents, attempt_id, positions=positions)

    async def _fetch(self, fetch: Callable[..., Awaitable[_T]], attempt_id: int, **terms: Any) -> _T:
        """Fetch what is in an attempt, however often the primary goes away."""
        for failures in itertools.count(1):
            try:
                async with self._primary.connection() as connection:
                    return await fetch(
                        connection,
                        self._config.database_schema,
                        backend_id=self._backend_id,
                        relay_id=self._relay_id,
                        attempt_id=attempt_id,
                        **terms,
                    )
            except PRIMARY_FAILED as error:
                code = code_of(error)
                extra = self._fields(attempt_id) | {"outbox_error_code": code}
                _log.warning("%s: load failed (%s)", self._backend_id, code, extra=extra)
                await self._primary.recover(failures)
        raise AssertionError("counting never ends")

    async def _dispatch(self, attempt: Attempt, in_hand: _InHand) -> Dispatched:
        """Dispatch until there is a result, or until the attempt is given up: then its events are as they were."""
        if not in_hand.given_up:
            in_hand.dispatching = asyncio.create_task(self._hand_over(attempt))
            await asyncio.wait({in_hand.dispatching})
            if not in_hand.dispatching.cancelled():
                return in_hand.dispatching.result()
        return Dispatched(attempt.alike(Released()))

    async def _hand_over(self, attempt: Attempt) -> Dispatched:
        try:
            await self.ahead.check()
        except Unavailable as error:
            return Dispatched(attempt.alike(Released(error.code)), error)
        budget = Budget(self._config.batch_bytes, partial(self._contents, attempt.attempt_id))
        return await dispatch(self._secondary, attempt, self._config.attempt_deadline, budget)

    async def _hand_back(self, opened: Opened, in_hand: _InHand) -> None:
        """Release what is still ours, once its dispatch has let go of it."""
        in_hand.give_up()
        if in_hand.dispatching is not None:
            await asyncio.wait({in_hand.dispatching})
        if (attempt := await self._load(opened)) is not None:
            await self.settle(attempt, Dispatched(attempt.alike(Released())))

    def _drop(self, attempt_id: int) -> None:
        extra = self._fields(attempt_id)
        _log.warning("%s: attempt %d was no longer ours; dropped", self._backend_id, attempt_id, extra=extra)

    def _tell_dead(self, attempt_id: int, settled: Settled) -> None:
        """Say how many keys are dead and why, once for the attempt; which ones is for `failures` to tell."""
        if settled.dead:
            code, extra = settled.error_code, self._fields(attempt_id)
            extra |= {"outbox_dead": settled.dead, "outbox_error_code": code}
            _log.warning(
                "%s: dead keys after attempt %d: %d (%s)", self._backend_id, attempt_id, settled.dead, code, extra=extra
            )

    def _fields(self, attempt_id: int) -> dict[str, object]:
        """What a handler of structured logs gets with every line about an attempt."""
        return {"outbox_backend_id": self._backend_id, "outbox_attempt_id": attempt_id}

    def _carried(self, carrying: asyncio.Task[int]) -> None:
        self._carrying.discard(carrying)
        if not carrying.cancelled() and (error := carrying.exception()) is not None:
            self._defect = error
        # Its keys are free again, and there is room for another attempt.
        self._freed()

    async def _trip(self, connection: asyncpg.Connection[Any], attempt: Attempt, unavailable: Unavailable) -> None:
        terms = (self._relay_id, self._config, unavailable.retry_after)
        await trip(connection, self._config.database_schema, attempt, *terms)
        self.strained = True

    async def _ease(self, connection: asyncpg.Connection[Any], dispatched: Dispatched) -> None:
        answered = any(isinstance(each, _ANSWERED) for each in dispatched.results)
        if self.strained and answered and dispatched.unavailable is None:
            await ease(connection, self._config.database_schema, self._backend_id, self._config.batch_size)
