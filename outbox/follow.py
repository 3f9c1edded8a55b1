"""Follow: what was committed to the secondaries it is owed to, waiting for some of them, as the mode says.

The commit stands before anything here begins. What is not there by the deadline is accepted and on its way, never
failed: a relay goes on with it. A caller that is cancelled stops waiting, and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from itertools import chain, islice

import msgspec

from outbox.answer import SyncState, SyncStatus
from outbox.dispatch import ask
from outbox.errors import SettingsError, Unavailable, UnknownSecondary
from outbox.primary import PRIMARY_FAILED, code_of
from outbox.register import Registration
from outbox.relay import Relay
from outbox.secondaries.base import Refreshable
from outbox.settings import SyncConfig, SyncMode
from outbox.token import SyncToken
from outbox.waiters import Waiters

__all__ = ["Follower"]

_log = logging.getLogger("outbox.follow")

_CARRYING = timedelta(milliseconds=8)


class _Refreshing:
    """One refresh for all who asked before it began."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._begun = self._ended = 0

    async def refreshed(self, secondary: Refreshable) -> None:
        asked = self._begun
        async with self._lock:
            if self._ended > asked:
                return
            self._begun += 1
            await secondary.refresh()
            self._ended = self._begun


class Follower:
    """Waits for secondaries on behalf of callers, and lends them a hand: the same lease as any relay takes."""

    def __init__(
        self,
        registrations: Sequence[Registration],
        config: SyncConfig,
        relay: Callable[[], Relay],
        waiters: Waiters,
    ) -> None:
        self._registrations: Mapping[str, Registration] = {each.backend_id: each for each in registrations}
        self._config = config
        self._make_relay = relay
        self._waiters = waiters
        self._ready = AsyncExitStack()
        self._pushing: set[asyncio.Task[None]] = set()
        self._begin()

    def waited_for(self, mode: SyncMode | None) -> set[str]:
        """Return the secondaries that a writer in this mode waits for; None is what each was registered with."""
        return {name for name, each in self._registrations.items() if self._waits(mode or each.mode, each)}

    async def follow(self, token: SyncToken, waited_for: set[str], timeout: timedelta) -> list[SyncStatus]:
        """Return a status for every secondary that is owed something or was named, those not waited for at once."""
        names = sorted({*token.backend_ids, *waited_for})
        return await asyncio.gather(*(self._one(name, token, name in waited_for, timeout) for name in names))

    async def show(self, status: SyncStatus, timeout: timedelta) -> SyncStatus:
        """Return the status once searches see what it speaks of, or with `visible` False at the deadline."""
        registration = self._registrations.get(status.backend_id)
        if registration is None:
            raise UnknownSecondary(status.backend_id, "this manager does not have its adapter, so it cannot refresh it")
        refreshing = self._refreshing[status.backend_id]
        visible = status.state.done
        if visible and isinstance(registration.secondary, Refreshable):
            try:
                await ask(partial(refreshing.refreshed, registration.secondary), timeout)
            except Unavailable:
                visible = False
        return msgspec.structs.replace(status, visible=visible)

    async def aclose(self) -> None:
        """Let what is in hand finish, or hand it back."""
        await self._ready.aclose()
        await asyncio.gather(*self._pushing, return_exceptions=True)
        # What a push opened meanwhile.
        await self._ready.aclose()
        self._begin()

    def _begin(self) -> None:
        """Be as new: a lock that was waited for belongs to its loop, and the next caller may come from another."""
        self._relay: Relay | None = None
        self._opening = asyncio.Lock()
        self._refreshing = {name: _Refreshing() for name in self._registrations}

    async def _one(self, backend_id: str, token: SyncToken, waited_for: bool, timeout: timedelta) -> SyncStatus:
        owed = token.owed_to(backend_id)
        if not owed or not waited_for:
            state = SyncState.ACCEPTED if owed else SyncState.NOT_OWED
            return SyncStatus(backend_id, state, events=sum(each.count for each in owed))
        if backend_id in self._registrations:
            # A task of its own: a caller who goes away must not take a claim with it.
            positions = chain.from_iterable(each.positions for each in owed)
            pushing = asyncio.create_task(self._push(backend_id, positions, timeout))
            self._pushing.add(pushing)
            pushing.add_done_callback(self._pushing.discard)
            # Nothing can be there before that: who carries it says when to look.
            return await self._waiters.wait(backend_id, token, timeout, first_look=_CARRYING)
        return await self._waiters.wait(backend_id, token, timeout)

    async def _push(self, backend_id: str, positions: Iterator[int], timeout: timedelta) -> None:
        """Carry what is owed, a batch at a time, for as long as the caller waits."""
        until = time.monotonic() + timeout.total_seconds()
        try:
            async with asyncio.timeout(timeout.total_seconds()):
                relay = await self._opened()
            while not relay.closing and (seconds := until - time.monotonic()) > 0:
                if not (page := list(islice(positions, self._config.batch_size))):
                    return
                await relay.seize(backend_id, page, timedelta(seconds=seconds))
                self._waiters.look_now(backend_id)
        except (*PRIMARY_FAILED, SettingsError) as error:
            # Out of reach, or behind a driver that no relay speaks.
            _log.warning("%s: could not lend a hand (%s); a relay will carry it", backend_id, code_of(error))

    async def _opened(self) -> Relay:
        async with self._opening:
            if self._relay is None:
                relay = self._make_relay()
                await self._ready.enter_async_context(relay.lending_hands())
                self._relay = relay
            return self._relay

    def _waits(self, mode: SyncMode | None, registration: Registration) -> bool:
        mode = mode or self._config.mode
        if mode is SyncMode.HYBRID:
            return self._config.sync_for_search and registration.role == "search"
        return mode is SyncMode.SYNCHRONOUS
