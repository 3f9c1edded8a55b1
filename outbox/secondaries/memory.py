"""A secondary in this process's memory: for first steps and for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from outbox.content import content_digest
from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Outcome, ResourceDigest, Stale

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
        live = [
            (event.resource_id.encode(), event)
            for event in self.held.values()
            if (event.tenant_id, event.resource_type) == (tenant_id, resource_type) and event.content is not None
        ]
        for _, event in sorted(live, key=lambda pair: pair[0]):
            if after is None or event.resource_id.encode() > after.encode():
                assert event.content is not None
                assert event.position is not None
                yield ResourceDigest(event.resource_id, event.position, content_digest(event.content))

    def content_of(self, resource_type: str, resource_id: str, *, tenant_id: str = "default") -> str | None:
        """Return the JSON text held for a resource; None when it is absent or deleted."""
        event = self.held.get((tenant_id, resource_type, resource_id))
        return None if event is None else event.content

    def _keep(self, event: SyncEvent) -> Outcome:
        assert event.position is not None, "only a recorded event has a position to compare"
        held = self.held.get(event.key)
        if held is not None and held.position is not None and held.position >= event.position:
            return Stale()
        self.held[event.key] = event
        return Applied()
