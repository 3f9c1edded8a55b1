"""Observed: a driver connection that tells the history what a relay claimed and settled.

It sees statements and answers as the driver does, so nothing in a relay knows of it.
"""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import asyncpg

from outbox.load import LOAD, LOAD_HELD
from outbox.settle import CLOSE, SETTLE
from outbox.testing.history import History
from outbox.testing.records import Claimed, Settled

__all__ = ["attempt_in_hand", "observed"]

#: The attempt whose events the running task fetched last; what it starts inherits it.
attempt_in_hand: ContextVar[int] = ContextVar("attempt_in_hand", default=0)

if TYPE_CHECKING:
    _Connection = asyncpg.Connection[Any]
else:
    # Generic only in its stubs.
    _Connection = asyncpg.Connection

_SCHEMA = "public"
_LOADS = dict(statement.asyncpg(_SCHEMA) for statement in (LOAD, LOAD_HELD))
_SETTLES = dict(statement.asyncpg(_SCHEMA) for statement in (CLOSE, SETTLE))


def observed(history: History, lease: float) -> type[asyncpg.Connection[Any]]:
    """Return a class of connections that write to this history."""

    class Observed(_Connection):
        """Tells of loads, which prove a claim, and of settles."""

        async def fetch(self, query: str, *arguments: Any, **options: Any) -> Any:
            """Fetch; what is loaded was claimed, and still is ours."""
            asked = time.monotonic_ns()
            rows = await super().fetch(query, *arguments, **options)
            if query in _LOADS and rows:
                terms = dict(zip(_LOADS[query], arguments, strict=True))
                _claimed(history, asked, terms, rows, lease)
            return rows

        async def fetchval(self, query: str, *arguments: Any, **options: Any) -> Any:
            """Fetch; a settle that found the attempt no longer ours says nothing."""
            asked = time.monotonic_ns()
            value = await super().fetchval(query, *arguments, **options)
            if query in _SETTLES:
                terms = dict(zip(_SETTLES[query], arguments, strict=True))
                _settled(history, asked, terms, counted=value is not None)
            return value

    return Observed


def _claimed(history: History, asked: int, terms: dict[str, Any], rows: list[Any], lease: float) -> None:
    attempt_in_hand.set(terms["attempt_id"])
    positions = sorted(row["event_id"] for row in rows if row["event_id"] is not None)
    names = {"backend_id": terms["backend_id"], "attempt_id": terms["attempt_id"]}
    history.write(Claimed(at=asked, positions=positions, lease=int(lease * 1e9), **names))


def _settled(history: History, asked: int, terms: dict[str, Any], *, counted: bool) -> None:
    how = "lost" if terms.get("expired") else "settled"
    names = {"backend_id": terms["backend_id"], "attempt_id": terms["attempt_id"]}
    history.write(Settled(asked=asked, counted=counted, how=how, **names))
