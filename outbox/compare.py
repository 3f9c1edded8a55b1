"""Compare: walk one tenant and type on both sides and name what differs, reading as little as the two sides allow.

Where both databases can sum up a range where it lies, ranges are summed and only those that differ are cut smaller,
down to what is listed (the idea of Merkle trees and of Dynamo's anti-entropy, without a tree to keep). Where only the
secondary can, the primary's rows are read in pages and each page is compared with a sum. Else both are listed and
merged. What this names is a suspect, no more: the two sides were not read at the same instant.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence

from outbox.listing import PrimaryRow, closed
from outbox.secondaries.base import Refreshable, ResourceDigest, Secondary, Summable, Summary
from outbox.source import Source

__all__ = ["Comparison"]

# A range is summed in a statement that takes well under a second, and cut into so many when it differs.
_RANGE = 10_000
_PARTS = 16
_LEAF = 640
# Where more than one in so many differs, summing first only adds to the listing.
_DENSE = 8


class Comparison:
    """One walk. `primary_count` and `secondary_count` say how many there were on each side, as far as it went."""

    def __init__(
        self,
        source: Source,
        secondary: Secondary,
        tenant_id: str,
        resource_type: str,
        pause: Callable[[], Awaitable[None]],
    ) -> None:
        self.primary_count = 0
        self.secondary_count = 0
        self.listed = 0
        self._source = source
        self._secondary = secondary
        self._key = (tenant_id, resource_type)
        self._pause = pause

    async def walk(self, after: str | None = None) -> AsyncIterator[tuple[str, bool]]:
        """Yield (id, True) for each resource that differs, in the order of the bytes, from above `after`.

        Now and then yields (id, False): everything up to there has been compared, and whoever stops may go on above it.
        """
        if isinstance(self._secondary, Refreshable):
            await self._secondary.refresh()
        if not isinstance(self._secondary, Summable):
            steps = self._merged(self._ours(after, None), after, None)
        elif await self._source.can_sum(self._key[1]):
            steps = self._by_ranges(self._secondary, after)
        else:
            steps = self._by_pages(self._secondary, after)
        async with closed(steps) as walking:
            async for step in walking:
                yield step

    async def _by_ranges(self, secondary: Summable, after: str | None) -> AsyncIterator[tuple[str, bool]]:
        dense = False
        while True:
            through = await self._source.boundary(*self._key, after, _RANGE)
            if dense:
                steps = self._merged(self._ours(after, through), after, through)
            else:
                steps = self._narrowed(secondary, after, through)
            found = 0
            async with closed(steps) as walking:
                async for name, differs in walking:
                    found += differs
                    yield name, differs
            if through is None:
                return
            yield through, False
            after, dense = through, found * _DENSE > _RANGE
            await self._pause()

    async def _narrowed(
        self, secondary: Summable, after: str | None, through: str | None
    ) -> AsyncIterator[tuple[str, bool]]:
        """Sum up a range on both sides; where it differs, look into its parts."""
        ours, theirs = await self._summaries(secondary, after, through)
        if ours == theirs:
            self._count(ours)
        elif ours.count <= _LEAF or theirs.count == 0:
            async with closed(self._merged(self._ours(after, through), after, through)) as steps:
                async for step in steps:
                    yield step
        else:
            async for low, high in self._parts(after, through, -(-ours.count // _PARTS)):
                async with closed(self._narrowed(secondary, low, high)) as steps:
                    async for step in steps:
                        yield step

    async def _summaries(self, secondary: Summable, after: str | None, through: str | None) -> tuple[Summary, Summary]:
        """Sum up a range on both sides at once; if the secondary cannot, nothing of the primary's goes on."""
        summing = asyncio.ensure_future(self._source.summarise(*self._key, after, through))
        try:
            theirs = await secondary.summarise(*self._key, after, through)
            return await summing, theirs
        finally:
            summing.cancel()
            await asyncio.gather(summing, return_exceptions=True)

    async def _parts(
        self, after: str | None, through: str | None, step: int
    ) -> AsyncIterator[tuple[str | None, str | None]]:
        low = after
        while True:
            high = await self._source.boundary(*self._key, low, step)
            if high is None or (through is not None and high.encode() >= through.encode()):
                yield low, through
                return
            yield low, high
            low = high

    async def _by_pages(self, secondary: Summable, after: str | None) -> AsyncIterator[tuple[str, bool]]:
        async with closed(self._source.pages(*self._key, after)) as pages:
            async for page in pages:
                through = page[-1].resource_id
                async with closed(self._page(secondary, page, after, through)) as steps:
                    async for step in steps:
                        yield step
                yield through, False
                after = through
                await self._pause()
        # Whatever the secondary holds above the primary's last.
        async with closed(self._page(secondary, [], after, None)) as steps:
            async for step in steps:
                yield step

    async def _page(
        self, secondary: Summable, page: list[PrimaryRow], after: str | None, through: str | None
    ) -> AsyncIterator[tuple[str, bool]]:
        self.listed += len(page)
        ours = Summary(len(page), sum(row.fingerprint for row in page))
        if ours == await secondary.summarise(*self._key, after, through):
            self._count(ours)
            return
        async with closed(self._merged(_each(page), after, through)) as steps:
            async for step in steps:
                yield step

    async def _merged(
        self, ours: AsyncIterator[tuple[str, str | None]], after: str | None, through: str | None
    ) -> AsyncIterator[tuple[str, bool]]:
        """Walk two listings of a range side by side; what is on one side only differs too."""
        async with closed(ours), closed(self._theirs(after, through)) as theirs:
            left, right = await anext(ours, None), await anext(theirs, None)
            while left is not None or right is not None:
                if right is None or (left is not None and left[0].encode() < right.resource_id.encode()):
                    assert left is not None
                    self.primary_count += 1
                    yield left[0], True
                    left = await anext(ours, None)
                elif left is None or right.resource_id.encode() < left[0].encode():
                    self.secondary_count += 1
                    yield right.resource_id, True
                    right = await anext(theirs, None)
                else:
                    self._count(Summary(1, 0))
                    yield left[0], left[1] != right.digest
                    left, right = await anext(ours, None), await anext(theirs, None)

    async def _ours(self, after: str | None, through: str | None) -> AsyncIterator[tuple[str, str | None]]:
        async with closed(self._source.pages(*self._key, after, through)) as pages:
            async for page in pages:
                self.listed += len(page)
                async for row in _each(page):
                    yield row
                await self._pause()

    async def _theirs(self, after: str | None, through: str | None) -> AsyncGenerator[ResourceDigest, None]:
        async with closed(self._secondary.scan(*self._key, after)) as listing:
            async for seen in listing:
                if through is not None and seen.resource_id.encode() > through.encode():
                    return
                yield seen

    def _count(self, summary: Summary) -> None:
        self.primary_count += summary.count
        self.secondary_count += summary.count


async def _each(page: Sequence[PrimaryRow]) -> AsyncIterator[tuple[str, str | None]]:
    """Yield ids and digests; digests of large contents take long enough to keep a relay's loop from its heartbeats."""
    for found in await asyncio.to_thread(lambda: [(row.resource_id, row.digest) for row in page]):
        yield found
