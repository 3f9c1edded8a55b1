"""Find: ask a secondary for one resource, and say in words why it cannot be asked."""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from outbox.errors import Unavailable
from outbox.secondaries.base import Findable, Refreshable, ResourceDigest, Secondary

__all__ = ["Asked", "found_at"]

_ANSWER_WITHIN = 5.0


class Asked(NamedTuple):
    """The resource that is asked about."""

    tenant_id: str
    resource_type: str
    resource_id: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The key as the statements take it."""
        return self._asdict()


async def found_at(secondary: Secondary | None, asked: Asked) -> ResourceDigest | str | None:
    """Return what a secondary holds of a resource, None when it holds nothing, or in words why nobody can say."""
    if secondary is None:
        return "what it holds cannot be said: this process does not have its adapter"
    if not isinstance(secondary, Findable):
        return "what it holds cannot be said: its adapter does not look at single resources"
    try:
        async with asyncio.timeout(_ANSWER_WITHIN):
            if isinstance(secondary, Refreshable):
                await secondary.refresh()
            found = await secondary.find(asked.tenant_id, asked.resource_type, [asked.resource_id])
    except Unavailable as error:
        return f"what it holds cannot be said: it does not answer ({error.code})"
    except TimeoutError:
        return f"what it holds cannot be said: it gave no answer within {_ANSWER_WITHIN:g} s"
    return next((each for each in found if each.resource_id == asked.resource_id), None)
