"""What a relay has in hand: one open attempt, and of each event what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from operator import attrgetter
from typing import Any, Self

import msgspec

from outbox.event import Operation, SyncEvent
from outbox.secondaries.base import Applied, Rejected, Retry, Stale

__all__ = ["COLUMNS", "OWED", "POSITION", "Attempt", "Held", "Lost", "Refused", "Released", "Result", "Superseded"]

# The events of attempts, each with what its hold remembers of its key; an event that is gone still has a row.
OWED = """from {schema}.outbox_attempt as attempt
cross join unnest(attempt.event_ids) as owed (event_id)
left join lateral (
    select * from {schema}.outbox as event where event.event_id = owed.event_id offset 0
) as event on true
left join lateral (
    select hold.attempts, hold.lost, hold.first_failed_at, hold.oldest_id
    from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id
      and hold.key_hash = hashtextextended(event.tenant_id || '/' || event.resource_type || '/' || event.resource_id, 0)
      and hold.tenant_id = event.tenant_id
      and hold.resource_type = event.resource_type and hold.resource_id = event.resource_id and hold.page = 0
    offset 0
) as hold on true"""

# An event as `Attempt.of_rows` takes it; a content of more than [share] bytes is left out.
COLUMNS = """event.tenant_id, event.resource_type, event.resource_id, event.operation,
       case when event.content_bytes <= [share] then cast(event.content as text) end as content,
       event.version, event.fhir_version, event.bulk_id, cast(event.headers as text) as headers, event.event_id,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       case when event.content_bytes > [share] then event.content_bytes end as left_out"""

_LEFT_OUT = -1
POSITION = -3
_REMEMBERED = 4

_OPERATIONS = {str(operation): operation for operation in Operation}


class Superseded(msgspec.Struct, frozen=True):
    """A newer event of the same key was in the same batch and stands for this one."""


class Released(msgspec.Struct, frozen=True):
    """The event was not tried, or is not to blame: it is held, due again, and spends no attempt."""

    code: str | None = None


class Refused(msgspec.Struct, frozen=True):
    """The secondary did not take the event, for reasons of its own: it has failed and waits, and spends no attempt."""

    code: str
    problem: str = ""
    after: timedelta | None = None


class Lost(msgspec.Struct, frozen=True):
    """The lease ran out: nobody knows whether the event was applied."""

    code: str = "lost"
    problem: str = "the relay that had this event in hand went away"


Result = Applied | Stale | Retry | Rejected | Superseded | Released | Refused | Lost


class Held(msgspec.Struct, frozen=True):
    """What its hold remembers of a key.

    Attempts spent on the event at its head, losses among them, the time since it first failed, and the lowest position
    not done.
    """

    attempts: int
    lost: int
    failing_for: timedelta | None
    oldest_id: int | None


class Attempt(msgspec.Struct, frozen=True):
    """One open attempt: a batch handed to one secondary by one relay. `attempt_id` is the fence.

    `events` are in position order, and results are lists beside them, index by index. `held` has the keys that came
    out of a hold. `left_out` has the bytes, by position, of contents that are too large to be fetched all at once.
    """

    attempt_id: int
    backend_id: str
    log_order: bool
    events: list[SyncEvent]
    held: dict[tuple[str, str, str], Held] = {}
    left_out: dict[int, int] = {}

    @classmethod
    def of_rows(cls, attempt_id: int, backend_id: str, *, log_order: bool, rows: Sequence[Sequence[Any]]) -> Self:
        """Build from rows of an event's columns, in the order of `SyncEvent`'s fields, and what was left out."""
        events = [_event(row) for row in rows]
        # Sorted here, because sorting wide rows in the database costs more.
        events.sort(key=attrgetter("position"))
        left_out = {row[POSITION]: size for row in rows if (size := row[_LEFT_OUT]) is not None}
        return cls(attempt_id, backend_id, log_order, events, {}, left_out)

    @classmethod
    def of_held(cls, attempt_id: int, backend_id: str, *, log_order: bool, rows: Sequence[Sequence[Any]]) -> Self:
        """Build from rows of what a hold remembers (null for no hold), an event's columns and what was left out."""
        # An event that somebody deleted by hand leaves nothing to deliver, but its attempt must be closed.
        found = [row[_REMEMBERED:] for row in rows if row[POSITION] is not None]
        held = {tuple(row[4:7]): Held(*row[:4]) for row in rows if row[0] is not None}
        attempt = cls.of_rows(attempt_id, backend_id, log_order=log_order, rows=found)
        return msgspec.structs.replace(attempt, held=held)

    def failed_before(self, key: tuple[str, str, str]) -> bool:
        """Whether the event at the head of a key has failed already, to blame or not."""
        held = self.held.get(key)
        return held is not None and held.failing_for is not None

    def alike(self, result: Result) -> list[Result]:
        """Give every event one result; in state order older events of a key are superseded whatever happens."""
        if self.log_order:
            return [result] * len(self.events)
        newest = {event.key: index for index, event in enumerate(self.events)}
        return [result if newest[event.key] == index else Superseded() for index, event in enumerate(self.events)]


def _event(row: Sequence[Any]) -> SyncEvent:
    tenant, kind, name, operation, content, version, fhir_version, bulk_id, headers, position, at, _ = row
    # A word of a newer version stays as it is: dispatch refuses it, so that it is failing and visible.
    known = _OPERATIONS.get(operation, operation)
    return SyncEvent(tenant, kind, name, known, content, version, fhir_version, bulk_id, headers, position, at)
