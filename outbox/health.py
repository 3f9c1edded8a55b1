"""Health: whether this process, its primary and every secondary are as they should be, and what is wrong if not."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SchemaMissing
from outbox.migrate import check_schema
from outbox.primary import PRIMARY_FAILED, code_of
from outbox.settings import SyncConfig
from outbox.status import BackendSyncStatus, lag_text, statuses

__all__ = ["Checkup", "Health", "HealthPart", "Roll", "reasons_in"]

_LOOP_LATE = 1.0


class HealthPart(msgspec.Struct, frozen=True):
    """One part of the answer: all is well, or the reasons why not."""

    reasons: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with this part."""
        return not self.reasons


class Health(msgspec.Struct, frozen=True):
    """How it all is. `process`: this process runs its relays and answers; to restart it helps if it does not.

    `database`: the primary answers and has the tables this code needs. `progress`: every secondary is healthy, by what
    the database says, so it is the same from every process. `secondaries` are empty if the database did not say.
    """

    process: HealthPart
    database: HealthPart
    progress: HealthPart
    secondaries: tuple[BackendSyncStatus, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong with any part."""
        return not self.reasons

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that is wrong."""
        return self.process.reasons + self.database.reasons + self.progress.reasons


class Roll:
    """Who of the relays of one manager ended by themselves, and was not run again since."""

    def __init__(self) -> None:
        self.failed = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Be a relay that runs: whoever leaves with an error, and was not cancelled, is missed."""
        self.failed = max(0, self.failed - 1)
        asked = False
        try:
            yield
            asked = True
        except asyncio.CancelledError:
            asked = True
            raise
        finally:
            self.failed += not asked


class Checkup:
    """Asks for the health of one manager. `expected` are the secondaries that the registry must have."""

    def __init__(self, engine: AsyncEngine, config: SyncConfig, expected: Sequence[str], roll: Roll) -> None:
        self._engine = engine
        self._config = config
        self._expected = expected
        self._roll = roll
        self._asking: asyncio.Task[list[BackendSyncStatus] | str] | None = None

    async def look(self) -> Health:
        """Return the health of everything; a primary that is away or hangs is a reason, and never an exception."""
        loop = asyncio.get_running_loop()
        asked_at = loop.time()
        await asyncio.sleep(0)
        process = HealthPart(tuple(self._missed(late=loop.time() - asked_at)))
        found = await self._answer()
        if isinstance(found, str):
            unknown = HealthPart(("how the secondaries are is not known: the database did not say",))
            return Health(process, HealthPart((f"database: {found}",)), unknown)
        return Health(process, HealthPart(), HealthPart(reasons_in(found, self._expected)), tuple(found))

    def _missed(self, late: float) -> Iterator[str]:
        if late > _LOOP_LATE:
            yield f"the event loop of this process answered {late:.1f} s late"
        if self._roll.failed:
            yield f"relays of this process that ended by themselves: {self._roll.failed}"

    async def _answer(self) -> list[BackendSyncStatus] | str:
        """Return what the database says, or what is wrong with it, in bounded time.

        All who ask at once share one question: whatever hangs has one connection of the application's pool, not all.
        """
        loop, limit = asyncio.get_running_loop(), self._config.health_timeout
        deadline = loop.time() + limit.total_seconds()
        while (left := deadline - loop.time()) > 0:
            asking = self._question(loop)
            await asyncio.wait({asking}, timeout=left)
            # One that was given up earlier says nothing about now.
            if asking.done() and not asking.cancelled():
                return asking.result()
        # Not waited for: to close a connection to a server that hangs may hang too.
        asking.cancel()
        return f"no answer within {lag_text(limit)}"

    def _question(self, loop: asyncio.AbstractEventLoop) -> asyncio.Task[list[BackendSyncStatus] | str]:
        asking = self._asking
        if asking is None or asking.done() or asking.get_loop() is not loop:
            asking = self._asking = loop.create_task(self._ask())
        return asking

    async def _ask(self) -> list[BackendSyncStatus] | str:
        try:
            await check_schema(self._engine, self._config.database_schema)
            return await statuses(self._engine, self._config)
        except SchemaMissing as error:
            return str(error)
        except PRIMARY_FAILED as error:
            return f"failed ({code_of(getattr(error, 'orig', None) or error)})"


def reasons_in(found: Sequence[BackendSyncStatus], expected: Sequence[str]) -> tuple[str, ...]:
    """Return what is wrong with any secondary, each reason with its name; that there is none is wrong too.

    Nobody relies on a shadow yet: what is wrong with it is told with it, and is no reason here.
    """
    known = {each.backend_id for each in found}
    unknown = [f"{name}: not registered" for name in expected if name not in known]
    relied_on = [each for each in found if each.status != "shadow"]
    if not found and not unknown:
        return ("no secondary is registered",)
    return (*unknown, *(f"{each.backend_id}: {reason}" for each in relied_on for reason in each.reasons))
