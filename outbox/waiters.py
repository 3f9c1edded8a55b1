"""Waiters: any number of callers wait for their own events, and one question at a time goes to the primary."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from contextlib import suppress
from datetime import timedelta
from itertools import islice

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.answer import SyncState, SyncStatus
from outbox.level import connected
from outbox.primary import PRIMARY_FAILED, code_of
from outbox.token import SyncToken
from outbox.wait import Asked, Found, fate, history, look

__all__ = ["Waiters"]

_log = logging.getLogger("outbox.wait")

_PAGE = 500
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.002, 0.2
# A caller is looked after again when this share more of its wait is over.
_PATIENCE = 0.1
_LAST_LOOK = 1.0
_AFTER_FAILURE = 0.1
# A network that swallows everything must not make this the last question that is asked.
_ANSWER_WITHIN = 5.0
# Whoever is due as soon as this is asked about in the same question.
_TOGETHER = 0.005
_FIRST_LOOK = 1.0
# Of several events the one that is worst off decides.
_WORST_FIRST = (
    SyncState.UNKNOWN,
    SyncState.ROLLED_BACK,
    SyncState.UNCOMMITTED,
    SyncState.PRUNED,
    SyncState.DEAD,
    SyncState.DISCARDED,
    SyncState.REMOVED,
    SyncState.PAUSED,
    SyncState.FAILING,
    SyncState.ACCEPTED,
    SyncState.APPLIED,
    SyncState.SUPERSEDED,
)


class _Waiter:
    """One caller and one secondary."""

    def __init__(self, backend_id: str, token: SyncToken, first_look: timedelta) -> None:
        self.backend_id = backend_id
        self.since = time.monotonic()
        self.next_look = self.since + first_look.total_seconds()
        owed = token.owed_to(backend_id)
        self.events = sum(each.count for each in owed)
        self.done = self._seen = 0
        # An event and its transaction, which is asked about when the event is not found; drawn a page at a time.
        self._coming = (
            ((backend_id, position, each.stamp), each.transaction_id) for each in owed for position in each.positions
        )
        # A plain dict would walk past all that was taken from its front.
        self._undone: OrderedDict[Asked, int] = OrderedDict()
        self._page: dict[Asked, int] = {}
        self._turn_page()
        # Transactions to ask about before the next look, and what was said of those asked about before.
        self.doubtful: set[int] = set()
        self._fates: dict[int, SyncState] = {}
        self.worst = Found(SyncState.ACCEPTED)
        self.looked = asyncio.Event()
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def page(self) -> list[Asked]:
        """What to ask next: a bulk of any size costs a look no more than this."""
        return list(self._page)

    @property
    def on_last_page(self) -> bool:
        """Whether nothing is left but the page."""
        return self.done + len(self._page) == self.events

    def _turn_page(self) -> None:
        """Go on to what was not looked at yet, then to what was not done."""
        self._page = dict(islice(self._coming, _PAGE))
        while len(self._page) < _PAGE and self._undone:
            asked, owed = self._undone.popitem(last=False)
            self._page[asked] = owed

    def learn(self, found: dict[Asked, Found], fates: dict[int, SyncState]) -> None:
        """Take in a look at `page`; `fates` are those of transactions that were asked about before it."""
        self._fates |= {each: fates[each] for each in self.doubtful & fates.keys()}
        self.doubtful.clear()
        told = {asked: self._told(asked, found) for asked in self._page}
        undone = {asked: self._page[asked] for asked, each in told.items() if not each.state.done}
        self.done += len(told) - len(undone)
        self._seen += len(told)
        self._undone |= undone
        self._turn_page()
        self.worst = min(told.values(), key=lambda each: _WORST_FIRST.index(each.state))
        if self.done < self.events and self.worst.state.done:
            self.worst = Found(SyncState.ACCEPTED)
        now = time.monotonic()
        pause = 0.0 if self.doubtful or not undone else _PATIENCE * (now - self.since)
        self.next_look = now + min(max(pause, _SHORTEST_SLEEP), _LONGEST_SLEEP)
        if self.doubtful:
            return
        if self._seen >= self.events or not self.worst.state.waits:
            self.looked.set()
        if not self.worst.state.waits and not self.ended.done():
            self.ended.set_result(None)

    def _told(self, asked: Asked, found: dict[Asked, Found]) -> Found:
        told = found[asked]
        if told.state is not SyncState.UNKNOWN:
            return told
        # Not there. A transaction that had ended before we looked says why; one that might have ended meanwhile not.
        transaction_id = self._page[asked]
        if transaction_id in self._fates:
            return Found(self._fates[transaction_id])
        self.doubtful.add(transaction_id)
        return Found(SyncState.ACCEPTED)

    def status(self, *, timed_out: bool = False) -> SyncStatus:
        state = SyncState.TIMED_OUT if timed_out and self.worst.state is SyncState.ACCEPTED else self.worst.state
        return SyncStatus(
            self.backend_id,
            state,
            self.worst.attempts,
            timedelta(seconds=time.monotonic() - self.since),
            self.worst.error_code,
            self.events,
            self.done,
        )


class Waiters:
    """Everybody in this process who waits on one primary; they take one connection together, while there are any."""

    def __init__(self, engine: AsyncEngine, schema: str) -> None:
        self._engine = engine
        self._schema = schema
        self._waiting: set[_Waiter] = set()
        self._looking: asyncio.Task[None] | None = None
        self._bell = asyncio.Event()

    async def wait(
        self, backend_id: str, token: SyncToken, timeout: timedelta, *, first_look: timedelta = timedelta(0)
    ) -> SyncStatus:
        """Return once the secondary has all that is owed to it, or never will by itself, or at the deadline.

        Looks once however short the time is, and first after `first_look` or when told to look now. Never raises for a
        primary that does not answer: then nothing is known.
        """
        waiter = _Waiter(backend_id, token, min(first_look, timeout))
        if not waiter.events:
            return SyncStatus(backend_id, SyncState.NOT_OWED, events=0)
        self._waiting.add(waiter)
        self._start()
        try:
            async with asyncio.timeout(timeout.total_seconds() or _FIRST_LOOK):
                await (waiter.ended if timeout else waiter.looked.wait())
        except TimeoutError:
            pass
        finally:
            self._waiting.discard(waiter)
        return waiter.status(timed_out=bool(timeout))

    async def aclose(self) -> None:
        """Let a look that nobody waits for any more come to its end, and with it its connection."""
        looking = self._looking
        if looking is not None and not self._waiting and looking.get_loop() is asyncio.get_running_loop():
            self._bell.set()
            await asyncio.wait({looking}, timeout=_LAST_LOOK)

    def look_now(self, backend_id: str) -> None:
        """Ask at once for those who wait on this secondary: something was settled in this process."""
        for waiter in self._waiting:
            if waiter.backend_id == backend_id:
                waiter.next_look = time.monotonic()
        self._bell.set()

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._looking is None or self._looking.done() or self._looking.get_loop() is not loop:
            # A bell that was waited for belongs to its loop, and this may be another one by now.
            self._bell = asyncio.Event()
            self._looking = loop.create_task(self._look_on())
            self._looking.add_done_callback(self._ended)
        self._bell.set()

    def _ended(self, looking: asyncio.Task[None]) -> None:
        """Let a defect reach those who wait, rather than leave them to their deadlines."""
        if not looking.cancelled() and (error := looking.exception()) is not None:
            for waiter in self._waiting:
                if not waiter.ended.done():
                    waiter.ended.set_exception(error)

    async def _look_on(self) -> None:
        while self._waiting:
            try:
                await self._look_once()
            except PRIMARY_FAILED as error:
                _log.warning("looking for what is waited for failed (%s)", code_of(error))
                await asyncio.sleep(_AFTER_FAILURE)
            await self._pause()

    async def _look_once(self) -> None:
        soon = time.monotonic() + _TOGETHER
        waiters = [each for each in self._waiting if each.next_look <= soon]
        if not waiters:
            return
        asked = sorted({each for waiter in waiters for each in waiter.page})
        doubtful = sorted({transaction_id for waiter in waiters for transaction_id in waiter.doubtful})
        async with asyncio.timeout(_ANSWER_WITHIN), connected(self._engine, "AUTOCOMMIT") as connection:
            fates = {each: await fate(connection, self._schema, each) for each in doubtful}
            found = await look(connection, self._schema, asked)
            ending = {each for waiter in waiters if waiter.on_last_page for each in waiter.page}
            if done := [each for each in ending if found[each].state.done]:
                found |= await history(connection, self._schema, done)
        for waiter in waiters:
            waiter.learn(found, fates)
        # Here and not only where they wait: whoever has an answer must not keep the others' loop from sleeping.
        self._waiting -= {waiter for waiter in waiters if waiter.ended.done()}

    async def _pause(self) -> None:
        """Sleep until somebody is due, or somebody new came."""
        self._bell.clear()
        if not (due := [each.next_look for each in self._waiting]):
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(min(due) - time.monotonic(), 0.0)):
                await self._bell.wait()
