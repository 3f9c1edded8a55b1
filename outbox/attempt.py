"""What a relay has in hand: one open attempt, and of each event what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Self

import msgspec

from outbox.event import Operation, SyncEvent
from outbox.secondaries.base import Applied, Rejected, Retry, Stale

__all__ = ["Attempt", "Held", "Lost", "Released", "Result", "Superseded", "event_of"]

_OPERATIONS = {str(operation): operation for operation in Operation}


class Superseded(msgspec.Struct, frozen=True):
    """A newer event of the same key was in the same batch and stands for this one."""


class Released(msgspec.Struct, frozen=True):
    """The event was not tried, or is not to blame: it is held, due again, and spends no attempt."""

    code: str | None = None


class Lost(msgspec.Struct, frozen=True):
    """The lease ran out: nobody knows whether the event was applied."""

    code: str = "lost"
    problem: str = "the relay that had this event in hand went away"


Result = Applied | Stale | Retry | Rejected | Superseded | Released | Lost


class Held(msgspec.Struct, frozen=True):
    """What its hold remembers of a key: failures of the event at its head, losses among them, time since the first."""

    attempts: int
    lost: int
    failing_for: timedelta | None


class Attempt(msgspec.Struct, frozen=True):
    """One open attempt: a batch handed to one secondary by one relay, in position order. `attempt_id` is the fence.

    `held` has the keys that came out of a hold. Results are lists beside `events`, index by index.
    """

    attempt_id: int
    backend_id: str
    log_order: bool
    events: list[SyncEvent]
    held: dict[tuple[str, str, str], Held] = {}

    @classmethod
    def of_held(cls, attempt_id: int, backend_id: str, *, log_order: bool, rows: Iterable[Sequence[Any]]) -> Self:
        """Build from rows of attempts, lost, time failing, and the event's columns; attempts is None for no hold."""
        events: list[SyncEvent] = []
        held = {}
        for attempts, lost, failing_for, *columns in rows:
            if columns[0] is None:
                continue  # somebody deleted the event by hand
            event = event_of(columns)
            events.append(event)
            if attempts is not None:
                held[event.key] = Held(attempts, lost, failing_for)
        return cls(attempt_id, backend_id, log_order, events, held)

    def alike(self, result: Result) -> list[Result]:
        """Give every event one result; in state order older events of a key are superseded whatever happens."""
        if self.log_order:
            return [result] * len(self.events)
        newest = {event.key: index for index, event in enumerate(self.events)}
        return [result if newest[event.key] == index else Superseded() for index, event in enumerate(self.events)]


def event_of(columns: Sequence[Any]) -> SyncEvent:
    """Build an event from its columns in the order of `SyncEvent`'s fields."""
    tenant, kind, name, operation, *rest = columns
    # A word of a newer version stays as it is: dispatch, and not the claim, refuses it.
    return SyncEvent(tenant, kind, name, _OPERATIONS.get(operation, operation), *rest)
