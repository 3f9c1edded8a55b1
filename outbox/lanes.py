"""Lanes: how much of a batch each lane gets, and from where its scan may start.

A lane is a hash of the tenant. A claim asks every lane for a share, so a tenant's million rows never stand before
another's one. A scan starts above its lane's floor, so that index entries of deleted rows are not walked again while
some old snapshot keeps vacuum from removing them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from outbox.schema import LANES
from outbox.statement import Statement

if TYPE_CHECKING:
    import asyncpg

__all__ = ["BARRIER", "HIGHEST", "SURVEY", "Asked", "Lanes", "advance_floors"]

# Read strictly before the barrier: whoever drew a position up to this one already had its transaction id.
HIGHEST = Statement("""
select case when is_called then last_value else 0 end from {schema}.outbox_event_id_seq
""")

# An id of our own is above all that were given so far. A snapshot's xmax is not: it only follows the ids that ended.
BARRIER = Statement("select cast(cast(pg_current_xact_id() as text) as bigint)")

SURVEY = Statement("""
select lane.lane, lowest.event_id
from unnest(cast(:lanes as smallint[]), cast(:floors as bigint[])) as lane (lane, floor)
left join lateral (
    select delivery.event_id
    from {schema}.outbox_delivery as delivery
    where delivery.backend_id = :backend_id and delivery.lane = lane.lane and delivery.event_id > lane.floor
    order by delivery.event_id
    limit 1
) as lowest on true
where cast(cast(pg_snapshot_xmin(pg_current_snapshot()) as text) as bigint) >= :barrier
""")


class Asked(msgspec.Struct, frozen=True):
    """One claim's question: lanes in the order they are asked, their floors and their shares."""

    lanes: list[int]
    floors: list[int]
    shares: list[int]


class Lanes:
    """What one relay knows of one secondary's lanes; a wrong share costs a part-filled batch, never an event."""

    def __init__(self) -> None:
        self.floors = [0] * LANES
        self._busy: set[int] = set()
        # How many deliveries the last claim found, and whether it may have left more of them.
        self.taken = 0
        self.more = False
        # Where holds absorbed something last time: there may be a long line of it, and they are to have it soon.
        self.lined: set[int] = set()
        self._first = 0
        self.mark: tuple[int, int] | None = None
        # Up to here nothing is owed and nothing can come: every writer who drew a position has ended.
        self.quiet: int | None = None

    def shares(self, batch_size: int) -> Asked:
        """Split a batch: lanes that were full last time share it, the others may show that they are not empty.

        While no lane is known to be full, any of them may fill the batch.
        """
        return self._asked(self._turns(batch_size))

    def lined_first(self, batch_size: int) -> Asked:
        """Split a batch of which holds absorb what is theirs: a lane where they did comes first, and may fill it."""
        turns = [(lane, batch_size if lane in self.lined else share) for lane, share in self._turns(batch_size)]
        return self._asked(sorted(turns, key=lambda turn: turn[0] not in self.lined))

    def _turns(self, batch_size: int) -> list[tuple[int, int]]:
        """Return every lane and its share, in the order in which they are asked."""
        if batch_size == 0:
            return []
        share = -(-batch_size // max(1, len(self._busy)))
        glance = -(-batch_size // LANES) if self._busy else batch_size
        turns = [(self._first + step) % LANES for step in range(LANES)]
        # Who is asked first changes from claim to claim, because the batch may be full before the last lane's turn.
        self._first = (self._first + 1) % LANES
        # Glances come first, because the busy lanes fill the batch.
        glances = [(lane, glance) for lane in turns if lane not in self._busy]
        return glances + [(lane, max(share, glance)) for lane in turns if lane in self._busy]

    def _asked(self, turns: list[tuple[int, int]]) -> Asked:
        return Asked(
            [lane for lane, _ in turns], [self.floors[lane] for lane, _ in turns], [share for _, share in turns]
        )

    def learn(self, asked: Asked, taken: Iterable[tuple[int | None, int]], *, full: bool) -> None:
        """Remember which lanes gave all they were asked for; lanes a full batch never reached stay as they were.

        `taken` says how many came from which lane; None is for what came out of holds.
        """
        counts: Counter[int] = Counter()
        for lane, deliveries in taken:
            if lane is not None:
                counts[lane] += deliveries
        reached = max((step for step, lane in enumerate(asked.lanes) if counts[lane]), default=-1) if full else LANES
        for step, (lane, share) in enumerate(zip(asked.lanes, asked.shares, strict=True)):
            if counts[lane] >= share:
                self._busy.add(lane)
            elif step < reached:
                self._busy.discard(lane)
        self.taken, self.more = counts.total(), full or bool(self._busy)

    def look_everywhere(self) -> None:
        """Forget the floors once: the net under their reasoning."""
        self.floors = [0] * LANES
        self.mark = self.quiet = None


async def advance_floors(connection: asyncpg.Connection[Any], schema: str, backend_id: str, lanes: Lanes) -> None:
    """Raise the floors as far as is certain.

    Having seen position M as the highest at one instant, a floor may pass M once every transaction that ran at that
    instant has ended and nothing below M is pending in its lane.
    """
    if lanes.mark is None:
        highest = await connection.fetchval(HIGHEST.on(schema))
        lanes.mark = (highest, await connection.fetchval(BARRIER.on(schema)))
        return
    highest, barrier = lanes.mark
    parameters = {
        "backend_id": backend_id,
        "lanes": list(range(LANES)),
        "floors": lanes.floors,
        "barrier": barrier,
    }
    rows = await connection.fetch(*SURVEY.arguments(schema, parameters))
    if not rows:
        return
    for lane, lowest in rows:
        lanes.floors[lane] = highest if lowest is None else min(highest, lowest - 1)
    lanes.quiet = highest if all(lowest is None for _, lowest in rows) else None
    lanes.mark = None
