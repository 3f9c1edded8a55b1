"""The one port: what a secondary must be able to do, and the words it answers in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Protocol, runtime_checkable

import msgspec

from outbox.event import SyncEvent

__all__ = [
    "Applied",
    "Checkable",
    "Closeable",
    "Findable",
    "Forgetful",
    "Fresh",
    "Listable",
    "Outcome",
    "Positioned",
    "Rebuildable",
    "Refreshable",
    "Rejected",
    "ResourceDigest",
    "Retry",
    "Secondary",
    "Stale",
    "Summable",
    "Summary",
]


class Applied(msgspec.Struct, frozen=True):
    """The secondary now holds this event's state."""


class Stale(msgspec.Struct, frozen=True):
    """The secondary already holds this position or a newer one and changed nothing. Counts as done."""


class Retry(msgspec.Struct, frozen=True):
    """The event failed and may succeed later; it spends an attempt, unless it is `blameless`.

    `code` is a short stable word for status pages and never holds content; `after` is a wait the secondary asked for.
    `blameless` says that the secondary refused the event for reasons of its own, which others may not meet: a part of
    it is lost, or it has too much to do. Such an event is tried again for ever, ever less often. A batch of which
    nothing else becomes counts as `Unavailable` does, unless all of it had failed before.
    """

    code: str
    problem: str = ""
    after: timedelta | None = None
    blameless: bool = False


class Rejected(msgspec.Struct, frozen=True):
    """The event will never succeed as it is; it is dead at once."""

    code: str
    problem: str = ""


Outcome = Applied | Stale | Retry | Rejected


class ResourceDigest(msgspec.Struct, frozen=True):
    """One live resource as a secondary holds it: its id, the position it was written at, and `content_digest`."""

    resource_id: str
    position: int
    digest: str


class Secondary(Protocol):
    """A backend kept in step with the primary.

    An implementation is ready after construction (connect lazily, inside the running loop) and is never called for one
    key twice at the same time.
    """

    @property
    def backend_id(self) -> str:
        """The name in the registry: `[a-z][a-z0-9_-]{0,62}`."""
        ...

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Make the secondary hold the state of each event; return one outcome per event, in the batch's order.

        Must be idempotent and guarded: an event whose `position` is not above the one held for its key changes nothing
        and is `Stale`, also after a delete, however long ago. Create and update are one upsert; deleting what is
        absent is `Applied`. No two events of a batch share a key. Content must arrive to the letter. Item failures are
        outcomes; raise `Unavailable` when the secondary could not be asked at all, or no further, with what is `known`
        of the batch by then. Let cancellation through.
        """
        ...

    def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield every live resource with an id above `after`, ordered by the UTF-8 bytes of the id.

        Memory stays bounded whatever the number of resources. Raises `Unavailable` when the listing cannot be
        completed: a short listing must never look like a complete one.
        """
        ...


@runtime_checkable
class Refreshable(Protocol):
    """A secondary whose writes become visible to readers only after a refresh."""

    async def refresh(self) -> None:
        """Return once everything applied so far is visible to searches."""
        ...


@runtime_checkable
class Checkable(Protocol):
    """A secondary that can say whether it is there, for all that it is sent."""

    async def check(self) -> None:
        """Return when the secondary answers, best when it takes a write; raise `Unavailable` when it does not.

        Nothing may be left of it. Asked when a batch hung, to tell a resource at fault from a secondary that is down.
        """
        ...


@runtime_checkable
class Findable(Protocol):
    """A secondary that can look at single resources without listing all of them."""

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live here, in any order, as `scan` would show them.

        Sees everything that `apply` has answered for, where `refresh` is not offered; else after a refresh. Takes a
        thousand ids. Raises `Unavailable` when it cannot answer for all of them.
        """
        ...


@runtime_checkable
class Listable(Protocol):
    """A secondary that can say which tenants and types it holds."""

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with a live resource, in any order. Raises `Unavailable`."""
        ...


class Summary(msgspec.Struct, frozen=True):
    """How many live resources a range holds, and the sum of what `fingerprint` gives for each."""

    count: int
    total: int


@runtime_checkable
class Summable(Protocol):
    """A secondary that can sum up a range of resources where they lie, without sending their contents."""

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        """Return the summary of the live resources with `after` < id <= `through`, by the UTF-8 bytes of the id.

        None leaves an end open. Computed from the contents as they are now, never from what was stored about them:
        `outbox.content.fingerprint` of the exact text. Raises `Unavailable`.
        """
        ...


@runtime_checkable
class Positioned(Protocol):
    """A secondary that knows how far it has come."""

    async def highest_position(self) -> int:
        """Return the highest position it holds, deletes included; 0 when it holds nothing. Raises `Unavailable`."""
        ...


class Fresh(Secondary, Protocol):
    """A secondary that is filled beside another, to take its place. Shares its connections, which are not closed here.

    Each step is harmless when it is done again.
    """

    async def switched(self) -> bool:
        """Whether it has taken the place. Raises `Unavailable`."""
        ...

    async def switch(self, resource_types: Sequence[str]) -> None:
        """Take the place for these types, at one moment: readers, and the writes of the other, meet what this holds.

        Until `drop_old` this one can be written to as before. Raises `Unavailable`.
        """
        ...

    async def drop_old(self) -> None:
        """Delete what it took the place of, and what it holds beside that. Raises `Unavailable`."""
        ...


@runtime_checkable
class Rebuildable(Protocol):
    """A secondary that can be filled anew beside what it holds."""

    async def fresh(self, backend_id: str) -> Fresh:
        """Return the one to fill: the one that was begun and not ended, else an empty one. Raises `Unavailable`."""
        ...


@runtime_checkable
class Forgetful(Protocol):
    """A secondary that remembers a delete for a while only."""

    @property
    def tombstones_for(self) -> timedelta:
        """How long; an older event that comes later than this would bring back what was deleted."""
        ...


@runtime_checkable
class Closeable(Protocol):
    """A secondary that holds connections."""

    async def aclose(self) -> None:
        """Release every connection; calling it twice is harmless."""
        ...
