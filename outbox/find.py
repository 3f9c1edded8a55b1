"""Find: ask a secondary for one resource."""

from __future__ import annotations

from typing import Any, NamedTuple

from outbox.secondaries.base import Findable, Refreshable, ResourceDigest

__all__ = ["Asked", "digest_at"]


class Asked(NamedTuple):
    """The resource that is asked about."""

    tenant_id: str
    resource_type: str
    resource_id: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The key as the statements take it."""
        return self._asdict()


async def digest_at(secondary: Findable, asked: Asked) -> ResourceDigest | None:
    """Return what a secondary holds of a resource, None when it holds nothing; raises whatever the adapter does."""
    if isinstance(secondary, Refreshable):
        await secondary.refresh()
    found = await secondary.find(asked.tenant_id, asked.resource_type, [asked.resource_id])
    return next((each for each in found if each.resource_id == asked.resource_id), None)
