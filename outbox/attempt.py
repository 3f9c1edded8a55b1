"""What a relay has in hand: one open attempt, and of each event what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Self

import msgspec

from outbox.event import Operation, SyncEvent
from outbox.secondaries.base import Applied, Rejected, Retry, Stale

__all__ = ["Attempt", "Claimed", "Lost", "Released", "Result", "Superseded"]

_OPERATIONS = {str(operation): operation for operation in Operation}
_NEVER = timedelta(0)


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


class Claimed(msgspec.Struct, frozen=True):
    """One event in hand, and what its hold remembers: `attempts` is None when the key was not held."""

    event: SyncEvent
    key_hash: int
    attempts: int | None
    lost: int
    failing_for: timedelta

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Self:
        """Build from a row of attempts, lost, time failing, key hash, and the event's columns in order."""
        attempts, lost, failing_for, key_hash, tenant, kind, name, operation, *rest = row
        # A word of a newer version stays as it is: dispatch, and not the claim, refuses it.
        event = SyncEvent(tenant, kind, name, _OPERATIONS.get(operation, operation), *rest)
        return cls(event, key_hash, attempts, lost, failing_for or _NEVER)

    @property
    def position(self) -> int:
        """The event's position, which a recorded event always has."""
        assert self.event.position is not None
        return self.event.position

    @property
    def created_at(self) -> datetime:
        """When the event was recorded, by the database's clock."""
        assert self.event.created_at is not None
        return self.event.created_at


class Attempt(msgspec.Struct, frozen=True):
    """One open attempt: a batch handed to one secondary by one relay, in position order. `attempt_id` is the fence."""

    attempt_id: int
    backend_id: str
    log_order: bool
    claimed: list[Claimed]
