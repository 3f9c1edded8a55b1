"""Roles: what the processes of a run do, each from its first breath to its last."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

from outbox.errors import Unavailable
from outbox.manager import SyncManager
from outbox.primary import PRIMARY_FAILED
from outbox.register import Registration
from outbox.testing.crash.dump import compare, count
from outbox.testing.crash.measure import measure
from outbox.testing.crash.observed import observed
from outbox.testing.crash.remote import RemoteSecondary
from outbox.testing.crash.shelf import serve
from outbox.testing.crash.terms import BACKENDS, SPARED, Terms, config_of, engine_of
from outbox.testing.crash.writing import track_items, write
from outbox.testing.history import History

__all__ = ["live", "registrations"]

_BETWEEN_COMPARISONS = 1.0
_LONGEST_COMPARISON = 300.0


def registrations(terms: Terms, caller: str, history: History | None = None) -> list[Registration]:
    """Return the secondaries of a run, as `caller` reaches them."""
    secondaries = {name: RemoteSecondary(name, terms.shelf, caller, history) for name in BACKENDS}
    return [Registration(secondary, ordering=BACKENDS[name]) for name, secondary in secondaries.items()]


async def _relay(terms: Terms, name: str) -> None:
    with History(terms.history, process=name, role="relay") as history:
        engine = engine_of(terms, name, connection_class=observed(history, terms.lease))
        relay = SyncManager(engine, registrations(terms, name, history), config=config_of(terms)).relay()
        relay.stop_on_signals()
        await relay.run()
        await engine.dispose()


async def _survivor(terms: Terms, name: str) -> None:
    """Relay, and say again and again how much one holds that nothing ends."""
    with History(terms.history, process=f"{name} measured", role="measured") as history:
        measuring = asyncio.create_task(measure(history), name=f"{name} measured")
        try:
            await _relay(terms, name)
        finally:
            measuring.cancel()
            await asyncio.wait([measuring])


async def _writer(terms: Terms, name: str) -> None:
    stopped = _stopped()
    with History(terms.history, process=name, role="writer") as history:
        # A writer whose answer never comes must learn that it does not know.
        engine = engine_of(terms, name, command_timeout=4, connection_class=observed(history, terms.lease))
        manager = SyncManager(engine, registrations(terms, name, history), config=config_of(terms))
        await write(terms, name, manager, history, stopped)
        await manager.aclose()
        await engine.dispose()


async def _prover(terms: Terms, name: str) -> None:
    """Compare both sides again and again while everything goes on: nobody damages anything, so nothing may differ."""
    with History(terms.history, process=name, role="prover") as history:
        engine = engine_of(terms, name, command_timeout=4)
        manager = SyncManager(engine, registrations(terms, name, history), config=config_of(terms))
        track_items(manager)
        proving = asyncio.create_task(_prove(manager, history))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, proving.cancel)
        await asyncio.wait([proving])
        if not proving.cancelled():
            proving.result()
        await engine.dispose()


async def _prove(manager: SyncManager, history: History) -> None:
    while True:
        for each in manager.registrations:
            limit = asyncio.timeout(_LONGEST_COMPARISON)
            try:
                async with limit:
                    await count(manager, history)
                    await compare(manager, each.backend_id, history)
            except (Unavailable, *PRIMARY_FAILED) as error:
                if limit.expired():
                    raise RuntimeError("a comparison that never ends") from error
        await asyncio.sleep(_BETWEEN_COMPARISONS)


def _stopped() -> asyncio.Event:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    return stopped


async def _shelf(terms: Terms, name: str) -> None:
    serving = asyncio.create_task(serve(terms), name=name)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, serving.cancel)
    await asyncio.wait([serving])
    if not serving.cancelled():
        serving.result()


_ROLES: dict[str, Callable[[Terms, str], Awaitable[None]]] = {
    "relay": _relay,
    "writer": _writer,
    "prover": _prover,
    "shelf": _shelf,
    SPARED: _survivor,
}


async def _live(role: str, terms: Terms, name: str, lifeline: int) -> None:
    # Nobody outlives the harness, whatever ends it.
    loop = asyncio.get_running_loop()
    loop.add_reader(lifeline, os._exit, 71)
    loop.add_signal_handler(signal.SIGUSR1, _say_what_goes_on)
    await _ROLES[role](terms, name)


def _say_what_goes_on() -> None:
    for task in asyncio.all_tasks():
        task.print_stack()


def live(role: str, terms: Terms, name: str, lifeline: int) -> None:
    """Be one process of a run; returns when it is stopped in order."""
    asyncio.run(_live(role, terms, name, lifeline))
