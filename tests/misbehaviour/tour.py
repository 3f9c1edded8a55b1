"""A tour of the table: a relay at work, fault after fault, and everything that must hold meanwhile and after."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, SyncManager
from outbox.event import SyncEvent
from outbox.secondaries.base import ResourceDigest, Secondary
from outbox.testing.states import seen
from tests.misbehaviour.faults import POISON, Fault
from tests.misbehaviour.outcomes import Away, Blamed, Done, OneDead, OneRetried, Outcome
from tests.misbehaviour.stands import Stand
from tests.relaying import change, execute, manager_of, pending, removal, rows, running, write
from tests.waiting import eventually

PLACE = ("default", "Thing")
KEYS = 6
# Enough that nothing dies of being retried while a slow machine looks.
NEVER_DEAD = {"max_attempts": 1_000_000, "breaker_max": 0.1}
AT_REST = """
update outbox_secondary
set breaker = 'closed', breaker_failures = 0, breaker_opens = 0, breaker_until = null, breaker_ramp = null
"""


class Tour:
    """One adapter through one fault after the other, beside a secondary that is never in trouble."""

    def __init__(self, primary: AsyncEngine, stand: Stand) -> None:
        self._beside = MemorySecondary("beside")
        self._manager: SyncManager = manager_of(primary, stand.secondary, self._beside, **NEVER_DEAD)
        self._primary, self._stand = primary, stand
        self._round = self._spent_before = 0

    async def take(self, rows: Sequence[tuple[Fault, Outcome]]) -> None:
        await self._manager.register()
        async with running(self._manager.relay()):
            for fault, expected in rows:
                try:
                    await self._visit(fault, expected)
                except BaseException as error:
                    error.add_note(f"in the row {fault.name!r}, where is expected: {expected}")
                    raise
        await self._lets_go()

    async def _visit(self, fault: Fault, expected: Outcome) -> None:
        """The fault comes, is told by what is recorded, harms nobody else, ends, and leaves nothing behind."""
        await execute(self._primary, AT_REST)
        self._round += 1
        self._spent_before += await self._spent()
        await self._write([change(f"p{n}", self._round) for n in range(KEYS)])
        await self._arrives()
        assert await self._spent() == 0, "a fault before the fault"
        before = await self._last_attempt()
        async with fault.make(self._stand):
            await self._write(self._changes(fault))
            await eventually(self._besides_arrives)
            await self._shows(expected, before)
        if isinstance(expected, OneDead):
            # What is dead stays so until something newer comes.
            await eventually(self._others_arrive)
            assert await self._dead() == [POISON]
            await self._write([change(POISON)])
        await self._arrives()
        assert (await self._manager.backend_status("copy")).dead == 0

    def _changes(self, fault: Fault) -> Sequence[SyncEvent]:
        """Updates, a delete, a new one; and one that some faults are about."""
        updates = [change(f"p{n}", -self._round) for n in range(3)]
        return [
            *updates,
            removal("p3"),
            change(f"new{self._round}"),
            SyncEvent.update("Thing", POISON, fault.poison),
        ]

    async def _shows(self, expected: Outcome, before: int) -> None:
        match expected:
            case Done():
                await self._arrives()
                assert await self._spent() == 0
                assert await self._codes(before) == set()
            case Away(codes=codes):
                await eventually(lambda: self._failed(before, 2))
                assert (found := await self._codes(before)) <= set(codes), found
                assert await self._spent() == 0, "an outage cost an attempt"
            case Blamed(codes=codes):
                await eventually(self._all_retried)
                assert (found := await self._codes(before)) <= set(codes), found
            case OneRetried(codes=codes):
                await eventually(self._others_arrive)
                await eventually(lambda: self._poison_is("retrying", codes))
            case OneDead(codes=codes):
                await eventually(self._others_arrive)
                await eventually(lambda: self._poison_is("dead", codes))
                assert await self._dead() == [POISON]

    async def _lets_go(self) -> None:
        """Whatever went wrong with connections, none is left."""
        if (line := self._stand.line) is not None:
            assert len(line.calls) <= 16, "connections pile up"
            await self._manager.aclose()
            await eventually(lambda: not line.calls)

    async def _write(self, events: Sequence[SyncEvent]) -> None:
        await write(self._manager, *events)

    async def _arrives(self) -> None:
        await eventually(self._nothing_owed)
        assert await seen(self._stand.direct, PLACE) == await seen(self._beside, PLACE)

    async def _nothing_owed(self) -> bool:
        return await pending(self._primary) == 0

    async def _besides_arrives(self) -> bool:
        return await pending(self._primary, "beside") == 0

    async def _others_arrive(self) -> bool:
        return await _but_poison(self._stand.direct) == await _but_poison(self._beside)

    async def _spent(self) -> int:
        status = await self._manager.backend_status("copy")
        return status.retried + status.rejected + status.lost - self._spent_before

    async def _last_attempt(self) -> int:
        [found] = await rows(self._primary, "select coalesce(max(attempt_id), 0) as last from outbox_attempt")
        return int(found["last"])

    async def _codes(self, after: int) -> set[str]:
        found = await self._failures(after)
        return {row["error_code"] for row in found}

    async def _failed(self, after: int, times: int) -> bool:
        return len(await self._failures(after)) >= times

    async def _failures(self, after: int) -> list[dict[str, str]]:
        return await rows(
            self._primary,
            "select error_code from outbox_attempt where backend_id = 'copy' and attempt_id > :after "
            "and error_code is not null",
            after=after,
        )

    async def _all_retried(self) -> bool:
        return await self._spent() >= KEYS

    async def _poison_is(self, state: str, codes: Sequence[str]) -> bool:
        found = await rows(
            self._primary, "select state, error_code, attempts from outbox_hold where resource_id = :id", id=POISON
        )
        assert [(row["state"], row["error_code"]) for row in found] in [[(state, code)] for code in codes], found
        return bool(found[0]["attempts"])

    async def _dead(self) -> list[str]:
        return [
            row["resource_id"] for row in await rows(self._primary, "select * from outbox_hold where state = 'dead'")
        ]


async def _but_poison(secondary: Secondary) -> list[ResourceDigest]:
    return [digest for digest in await seen(secondary, PLACE) if digest.resource_id != POISON]


@asynccontextmanager
async def nothing_left_open(primary: AsyncEngine) -> AsyncIterator[None]:
    """No descriptor is open at the end that was not at the beginning; the primary's own are not counted."""
    await primary.dispose()
    before = descriptors()
    yield
    await primary.dispose()
    await eventually(lambda: descriptors() <= before)


def descriptors() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())
