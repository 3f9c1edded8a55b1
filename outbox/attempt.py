"""What a relay has in hand: one open attempt, and of each event what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from operator import attrgetter
from typing import Any, Self

import msgspec

from outbox.event import Operation, SyncEvent
from outbox.secondaries.base import Applied, Rejected, Retry, Stale

__all__ = ["Attempt", "Held", "Lost", "Released", "Result", "Superseded", "event_of"]

_POSITION = 2
"""Where the position stands, counted from the end of a row."""

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


class Attempt(msgspec.Struct, frozen=True, dict=True):
    """One open attempt: a batch handed to one secondary by one relay. `attempt_id` is the fence.

    `held` has the keys that came out of a hold. `rows` end in the columns of an event; results are lists beside
    `events`, index by index.
    """

    attempt_id: int
    backend_id: str
    log_order: bool
    rows: Sequence[Sequence[Any]]
    held: dict[tuple[str, str, str], Held] = {}

    @cached_property
    def events(self) -> list[SyncEvent]:
        """The events in position order. Built when first asked for, so that the next claim is under way meanwhile."""
        # An event that somebody deleted by hand leaves nothing to deliver, but its attempt must be closed.
        events = [event_of(row) for row in self.rows if row[-_POSITION] is not None]
        # Sorted here, because sorting wide rows in the database costs more.
        events.sort(key=attrgetter("position"))
        return events

    @classmethod
    def of_held(cls, attempt_id: int, backend_id: str, *, log_order: bool, rows: Sequence[Sequence[Any]]) -> Self:
        """Build from rows of attempts, lost, time failing, and the event's columns; attempts is None for no hold."""
        held = {tuple(row[3:6]): Held(*row[:3]) for row in rows if row[0] is not None}
        return cls(attempt_id, backend_id, log_order, rows, held)

    def alike(self, result: Result) -> list[Result]:
        """Give every event one result; in state order older events of a key are superseded whatever happens."""
        if self.log_order:
            return [result] * len(self.events)
        newest = {event.key: index for index, event in enumerate(self.events)}
        return [result if newest[event.key] == index else Superseded() for index, event in enumerate(self.events)]


def event_of(row: Sequence[Any]) -> SyncEvent:
    """Build an event from a row that ends in its columns, in the order of `SyncEvent`'s fields."""
    *_, tenant, kind, name, operation, content, version, fhir_version, bulk_id, headers, position, at = row
    # A word of a newer version stays as it is: dispatch, and not the claim, refuses it.
    known = _OPERATIONS.get(operation, operation)
    return SyncEvent(tenant, kind, name, known, content, version, fhir_version, bulk_id, headers, position, at)
