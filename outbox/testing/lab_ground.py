"""The ground of one scenario: a tenant of its own, a history to carry, and hands to fail at any step."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from uuid import uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import stop_after_attempt, wait_fixed

from outbox.attempt import Attempt
from outbox.dispatch import Dispatched, dispatch
from outbox.event import Operation, SyncEvent
from outbox.lanes import Lanes
from outbox.load import load
from outbox.manager import SyncManager
from outbox.primary import Primary
from outbox.register import Registration
from outbox.resume import resume
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Outcome, ResourceDigest, Secondary
from outbox.settle import Settled, settle
from outbox.statement import Statement
from outbox.status import Failure
from outbox.testing.relay import InProcessRelay, quick_config
from outbox.turn import take_turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["RECORDED", "STEPS", "TYPE", "Apply", "Fault", "Faulty", "Ground"]

RECORDED = Statement("""
select tenant_id, resource_type, resource_id, operation, cast(content as text) as content, event_id
from {schema}.outbox
where tenant_id = :tenant_id
order by event_id
""")

TYPE = "Thing"
#: What each transaction writes, and what it deletes: in the end b, c and e are there, a and d are not.
STEPS = (("abcd", ""), ("ac", "b"), ("be", "ad"))

Apply = Callable[[Sequence[SyncEvent]], Awaitable[Sequence[Outcome]]]
Fault = Callable[[Apply, Sequence[SyncEvent]], Awaitable[Sequence[Outcome]]]

# A lease that has run out by the time anybody looks: its relay is never heard of again.
_GONE = timedelta(milliseconds=1)
_DEADLINE = timedelta(seconds=60)
_SCHEMA = "public"


class Faulty:
    """A secondary that lets faults have its next calls, and every other call through.

    Offers nothing beyond the port: what else it can do would be asked behind the fault's back.
    """

    def __init__(self, backend_id: str, secondary: Secondary) -> None:
        self._faults: list[Fault] = []
        self._backend_id = backend_id
        self._secondary = secondary

    @property
    def backend_id(self) -> str:
        """The scenario's name in the registry."""
        return self._backend_id

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Apply as the next fault has it."""
        apply = self._secondary.apply
        return await (self._faults.pop(0)(apply, batch) if self._faults else apply(batch))

    def breaks(self, *faults: Fault) -> None:
        """Let each of these have one call, from the next on."""
        self._faults = [*faults]

    def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """List what the secondary lists."""
        return self._secondary.scan(tenant_id, resource_type, after)


class Ground:
    """Where one scenario happens. Nobody else's events reach its registration, and it gets no others."""

    def __init__(self, name: str, engine: AsyncEngine, secondary: Secondary, within: timedelta) -> None:
        # New every time: a secondary that was here before must not know its keys.
        self.tenant_id = f"{name.replace(' ', '-')}-{uuid4().hex[:12]}"
        self.secondary = secondary
        self.faulty = Faulty(f"lab-{self.tenant_id}", secondary)
        config = quick_config(doorbell=False, database_schema=_SCHEMA)
        # What failed together is due together: a batch is handed over again as it was, and not by chance in parts.
        self._policy = RetryPolicy(wait_fixed(0.01), stop_after_attempt(config.max_attempts), config.retry_max)
        terms = Registration(self.faulty, tenant_ids=[self.tenant_id])
        self.manager = SyncManager(engine, [terms], config=config, retry=self._policy)
        self.primary = Primary(engine, config)
        self._relay = InProcessRelay(self.manager)
        self._opened = AsyncExitStack()
        self._engine = engine
        self._within = within
        self._relay_id = uuid4()
        self._alive: set[str] = set()

    async def __aenter__(self) -> Self:
        await self.manager.register()
        await self.primary.open()
        self._opened.push_async_callback(self.primary.close)
        await self._opened.enter_async_context(self._relay.connected())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._opened.aclose()

    async def steps(self) -> AsyncGenerator[int]:
        """Commit each step of the history, let the scenario fail there, then let a healthy relay carry the rest."""
        for number in range(len(STEPS)):
            await self.commit(number)
            yield number
            await self.carry()

    async def commit(self, number: int) -> None:
        """Commit one step of the history in one transaction."""
        written, deleted = STEPS[number]
        async with self.manager.session() as session, session.begin():
            session.record(*(self._write(name, number) for name in written))
            session.record(*(SyncEvent.delete(TYPE, name, tenant_id=self.tenant_id) for name in deleted))

    async def carry(self) -> list[Failure]:
        """Let a healthy relay carry all that is owed; return what is dead. Raises `StillOwed`."""
        return await self._relay.until_idle(may_fail=True, timeout=self._within)

    async def recorded(self) -> list[SyncEvent]:
        """Return what the primary has recorded, in position order."""
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(RECORDED.on(_SCHEMA)), {"tenant_id": self.tenant_id})
            return [_event(*row) for row in rows]

    async def claim(self) -> Attempt:
        """Take in hand what is owed, as a relay that is never heard of again."""
        async with self.primary.connection() as connection, connection.transaction():
            return await self.claim_on(connection)

    async def claim_on(self, connection: asyncpg.Connection[Any]) -> Attempt:
        """Take in hand in the connection's transaction, with what the claimed events hold."""
        names: dict[str, Any] = {"backend_id": self.faulty.backend_id, "relay_id": self._relay_id}
        turn = await take_turn(connection, _SCHEMA, self.faulty.backend_id)
        assert turn is not None, "nobody else claims here"
        terms: dict[str, Any] = {"turn": turn, "batch_size": 100, "lanes": Lanes(), "lease": _GONE}
        attempt_id = (await resume(connection, _SCHEMA, **names, **terms)).attempt_id
        assert attempt_id is not None, "what was committed just now is owed"
        loading: dict[str, Any] = {
            "log_order": turn.log_order,
            "held": True,
            "batch_bytes": 2**24,
            "attempt_id": attempt_id,
        }
        attempt = await load(connection, _SCHEMA, **names, **loading)
        assert attempt is not None, "an attempt that was opened just now can be loaded"
        return attempt

    async def dispatch(self, attempt: Attempt, deadline: timedelta = _DEADLINE) -> Dispatched:
        """Hand an attempt over as a relay does: whatever the secondary raises becomes a result."""
        return await dispatch(self.faulty, attempt, deadline)

    async def hand_over(self, events: Sequence[SyncEvent]) -> None:
        """Hand over events whoever else did so before, without an attempt: as one whose lease is long gone."""
        await self.dispatch(Attempt(0, self.faulty.backend_id, False, list(events)))

    async def settle(self, attempt: Attempt, dispatched: Dispatched) -> Settled | None:
        """Settle an attempt; None when it was no longer ours."""
        async with self.primary.connection() as connection:
            return await self.settle_on(connection, attempt, dispatched)

    async def settle_on(
        self, connection: asyncpg.Connection[Any], attempt: Attempt, dispatched: Dispatched
    ) -> Settled | None:
        """Settle in the connection's transaction, if it has one."""
        return await settle(connection, _SCHEMA, self._relay_id, attempt, dispatched.results, self._policy)

    def _write(self, name: str, number: int) -> SyncEvent:
        make = SyncEvent.update if name in self._alive else SyncEvent.create
        self._alive.add(name)
        # What a detour through Python's numbers, or through another encoding, would alter.
        content = f'{{"name":"é {name}","step":{number},"price":1.50,"exact":{2**53 + 1}}}'
        return make(TYPE, name, content, tenant_id=self.tenant_id, version=number)


def _event(tenant_id: str, kind: str, name: str, operation: str, content: str | None, position: int) -> SyncEvent:
    return SyncEvent(tenant_id, kind, name, Operation(operation), content, position=position)
