"""A secondary in this process's memory: for first steps and for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence

from outbox.content import content_digest, fingerprint
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, ResourceDigest, Stale, Summary

__all__ = ["MemorySecondary"]


class MemorySecondary:
    """Holds the newest event of every key in a dict, tombstones included; gone when the process ends."""

    def __init__(self, backend_id: str = "memory") -> None:
        self._backend_id = backend_id
        self.held: dict[tuple[str, str, str], SyncEvent] = {}

    @property
    def backend_id(self) -> str:
        """The name in the registry."""
        return self._backend_id

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        """Keep each event that is newer than what is held for its key."""
        return [self._keep(event) for event in batch]

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[ResourceDigest]:
        """Yield the live resources in id order."""
        live = self._range(tenant_id, resource_type, after)
        for event in sorted(live, key=lambda event: event.resource_id.encode()):
            yield _digest(event)

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        """Return those of the resources that are live."""
        found = (self.held.get((tenant_id, resource_type, each)) for each in dict.fromkeys(resource_ids))
        return [_digest(event) for event in found if event is not None and event.content is not None]

    async def scopes(self) -> Sequence[tuple[str, str]]:
        """Return every (tenant_id, resource_type) with a live resource."""
        return list({event.key[:2]: None for event in self.held.values() if event.content is not None})

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        """Return how many live resources lie in the range, and the sum of their fingerprints."""
        prints = [
            fingerprint(event.resource_id, event.content)
            for event in self._range(tenant_id, resource_type, after, through)
            if event.content is not None
        ]
        return Summary(len(prints), sum(prints))

    async def highest_position(self) -> int:
        """Return the highest position held, deletes included; 0 when nothing is held."""
        return max((event.position or 0 for event in self.held.values()), default=0)

    def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        event = self.held.get((tenant_id, resource_type, resource_id))
        return None if event is None else event.content

    def _range(
        self, tenant_id: str, resource_type: str, after: str | None, through: str | None = None
    ) -> Iterator[SyncEvent]:
        """Yield what is live with `after` < id <= `through`, in no order, from the state of this moment."""
        for event in list(self.held.values()):
            name = event.resource_id.encode()
            within = (after is None or name > after.encode()) and (through is None or name <= through.encode())
            if within and event.key[:2] == (tenant_id, resource_type) and event.content is not None:
                yield event

    def _keep(self, event: SyncEvent) -> Outcome:
        assert event.position is not None, "only a recorded event has a position to compare"
        held = self.held.get(event.key)
        if held is not None and held.position is not None and held.position >= event.position:
            return Stale()
        self.held[event.key] = event
        return Applied()


def _digest(event: SyncEvent) -> ResourceDigest:
    assert event.content is not None, "a tombstone has no content to compare"
    assert event.position is not None
    return ResourceDigest(event.resource_id, event.position, content_digest(event.content))
