"""A search secondary that can be filled anew beside what it holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from outbox.secondaries.opensearch_generations import Generation
from outbox.secondaries.opensearch_secondary import SearchSecondary

__all__ = ["FreshSearch", "RebuildableSearch"]


class RebuildableSearch(SearchSecondary):
    """One whose names may lead to other indices, filled with the mapping and settings it has now."""

    async def fresh(self, backend_id: str) -> FreshSearch:
        """Return a secondary that fills indices beside those that are searched. Raises `Unavailable`."""
        return FreshSearch(self, backend_id, await Generation.beside(self._http, self._prefix))


class FreshSearch(SearchSecondary):
    """The same server, mapping and settings under names of its own, until it takes the place of the other."""

    def __init__(self, beside: SearchSecondary, backend_id: str, generation: Generation) -> None:
        vars(self).update(copy.copy(vars(beside)))
        self._backend_id = backend_id
        self._prefix = generation.prefix
        self._taken_name = beside.search_name
        self._generation = generation

    async def switched(self) -> bool:
        """Whether what this holds is what is searched. Raises `Unavailable`."""
        return await self._generation.switched()

    async def switch(self, resource_types: Sequence[str]) -> None:
        """Let the names that are searched lead to what this holds, all at one moment. Raises `Unavailable`."""
        await self.refresh()
        await self._generation.switch(map(self._taken_name, resource_types))

    async def drop_old(self) -> None:
        """Delete the indices whose place was taken, and those of this that took none. Raises `Unavailable`."""
        await self._generation.drop_old()

    async def aclose(self) -> None:
        """The connections are the other's."""
