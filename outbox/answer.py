"""Answer: what became of recorded events on each secondary, in words that are never truer than the database."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from enum import StrEnum

import msgspec

__all__ = ["SyncResult", "SyncState", "SyncStatus"]


class SyncState(StrEnum):
    """What became of events on one secondary; of several events the one that is worst off decides."""

    APPLIED = "applied"
    """The secondary holds the event's state, or a newer one of its key."""
    SUPERSEDED = "superseded"
    """Done without being sent: a newer event of the same key was applied in its stead."""
    ACCEPTED = "accepted"
    """Recorded and committed; a relay will carry it, and nobody was asked to wait for that."""
    TIMED_OUT = "timed_out"
    """Waited for and still on its way at the deadline; a relay goes on with it."""
    FAILING = "failing"
    """It failed, and is tried again by itself."""
    DEAD = "dead"
    """It failed for good; a newer event of its key, or a redrive, is what helps."""
    DISCARDED = "discarded"
    """An operator gave it up."""
    PAUSED = "paused"
    """The secondary is paused and does not have it yet."""
    REMOVED = "removed"
    """The secondary was removed before it had it."""
    NOT_OWED = "not_owed"
    """The secondary did not want the event, or was registered later."""
    UNCOMMITTED = "uncommitted"
    """Its transaction is still open: nothing can have happened yet."""
    ROLLED_BACK = "rolled_back"
    """Its transaction, or the savepoint it was written in, was rolled back, or lost in a crash of the primary."""
    PRUNED = "pruned"
    """Committed, and since forgotten: whatever was owed of it ended before."""
    UNKNOWN = "unknown"
    """This database knows nothing of it."""

    @property
    def done(self) -> bool:
        """Whether the secondary has what was recorded."""
        return self in _DONE

    @property
    def waits(self) -> bool:
        """Whether waiting longer may help."""
        return self in _WAITING


_DONE = (SyncState.APPLIED, SyncState.SUPERSEDED)
_WAITING = (SyncState.ACCEPTED, SyncState.TIMED_OUT, SyncState.FAILING)


class SyncStatus(msgspec.Struct, frozen=True):
    """What became of what was recorded, on one secondary.

    `attempts` counts how often the event worst off was handed to the secondary: also when the last of them succeeded;
    None where the attempt is no longer among the latest. `duration` is how long the caller waited for this answer.
    `events` is how many were asked about and `done` how many of them the secondary has. `visible` is True once searches
    see them; None where nobody asked.
    """

    backend_id: str
    state: SyncState
    attempts: int | None = None
    duration: timedelta = timedelta(0)
    error_code: str | None = None
    events: int = 1
    done: int = 0
    visible: bool | None = None

    @property
    def synced(self) -> bool:
        """Whether the secondary has everything asked about, and shows it if that was asked too."""
        return self.state.done and self.visible is not False


class SyncResult(msgspec.Struct, frozen=True):
    """One status for every secondary that was asked about; true only when every one of them has everything.

    Never true of nothing: an answer about no secondary, or about no event, is false.
    """

    statuses: tuple[SyncStatus, ...]

    @property
    def synced(self) -> bool:
        """Whether there is a secondary at all, and each has what was recorded."""
        return bool(self.statuses) and all(status.synced for status in self.statuses)

    def __bool__(self) -> bool:
        return self.synced

    def __iter__(self) -> Iterator[SyncStatus]:
        return iter(self.statuses)

    def __len__(self) -> int:
        return len(self.statuses)

    def __getitem__(self, backend_id: str) -> SyncStatus:
        for status in self.statuses:
            if status.backend_id == backend_id:
                return status
        raise KeyError(backend_id)
