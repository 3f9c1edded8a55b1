"""A relay in the process of an application's own tests: carries until nothing is owed, or beside a block."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from datetime import timedelta
from typing import Any

from outbox.manager import SyncManager
from outbox.relay import Relay
from outbox.settings import SyncConfig
from outbox.status import BackendSyncStatus, Failure

__all__ = ["Failed", "InProcessRelay", "StillOwed", "quick_config"]

_PAUSE = 0.01
# What can be listed of what is dead; nobody's test has more.
_MOST = 10_000
_CARRIED = ("live", "shadow", "draining")
_QUICK: dict[str, Any] = {
    "poll_interval": 0.02,
    "retry_initial": 0.01,
    "retry_max": 0.05,
    "breaker_initial": 0.05,
    "breaker_max": 0.2,
    # Nothing of what a test asserts is to be compared or repaired behind its back.
    "proof_interval": None,
}


class StillOwed(AssertionError):
    """Time ran out with something still owed; says to whom, how much and why, never content."""


class Failed(AssertionError):
    """Something is dead: says which keys of which secondary, and the code, never content."""


def quick_config(**settings: Any) -> SyncConfig:
    """Return settings whose retries and breakers wait for milliseconds; `settings` (durations also in seconds) win.

    Raises `SettingsError`.
    """
    return SyncConfig(**(_QUICK | settings))


class InProcessRelay:
    """Carries what a manager's secondaries are owed. Nothing is carried before it is asked to.

    Register first: what was committed before a secondary was in the registry is not owed to it.
    """

    def __init__(self, manager: SyncManager) -> None:
        self._manager = manager
        self._lent: Relay | None = None

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[None]:
        """Stay connected for a block, in which `until_idle` is then quicker."""
        relay = self._manager.relay()
        async with relay.lending_hands():
            self._lent = relay
            try:
                yield
            finally:
                self._lent = None

    async def until_idle(
        self, *, may_fail: bool = False, timeout: timedelta | float = timedelta(seconds=60)
    ) -> list[Failure]:
        """Carry until nothing is owed any more, retries and breakers waited for; return what is dead.

        What is paused is not waited for. Raises `Failed` when something is dead, unless it `may_fail`; `StillOwed`
        when something is still owed after `timeout` (seconds), as when a secondary stays unavailable.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        async with nullcontext() if self._lent else self.connected():
            dead = await self._carry(seconds)
        if dead and not may_fail:
            raise Failed("; ".join(map(_told, dead)))
        return dead

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Carry beside a block, as a process of its own would, for code that waits. Raises what ended the relay."""
        relay = self._manager.relay()
        carrying = asyncio.create_task(relay.run())
        try:
            yield
        finally:
            relay.stop()
            await carrying

    async def _carry(self, seconds: float) -> list[Failure]:
        assert self._lent is not None, "connected above"
        until = time.monotonic() + seconds
        while True:
            await self._lent.drain()
            statuses = await self._statuses()
            dead = await self._dead() if any(each.pending for each in statuses) else []
            if not (owed := _owed(statuses, dead)):
                return dead
            if time.monotonic() >= until:
                raise StillOwed(f"after {seconds:g} s still owed: {'; '.join(owed)}")
            await asyncio.sleep(_PAUSE)

    async def _statuses(self) -> list[BackendSyncStatus]:
        """Return those of ours that are carried."""
        statuses = await self._manager.all_statuses()
        return [each for each in statuses if each.backend_id in self._names and each.status in _CARRIED]

    async def _dead(self) -> list[Failure]:
        failures = await self._manager.failures(most=_MOST)
        return [each for each in failures if each.backend_id in self._names and each.state == "dead"]

    @property
    def _names(self) -> set[str]:
        return {each.backend_id for each in self._manager.registrations}


def _owed(statuses: Sequence[BackendSyncStatus], dead: Sequence[Failure]) -> list[str]:
    """Say of each secondary what it is owed beside what is dead."""
    owed = []
    for status in statuses:
        given_up = sum(each.owed for each in dead if each.backend_id == status.backend_id)
        if (left := status.pending - given_up) > 0:
            code = f", last error {status.last_error_code}" if status.last_error_code else ""
            owed.append(f"{left} to {status.backend_id} (breaker {status.breaker}{code})")
    return owed


def _told(failure: Failure) -> str:
    key = f"{failure.tenant_id}/{failure.resource_type}/{failure.resource_id}"
    return f"{failure.backend_id}: {key} is dead ({failure.error_code}) after attempts: {failure.attempts}"
