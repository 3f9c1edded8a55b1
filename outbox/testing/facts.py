"""Facts: what a whole history says, put together so that each check can ask its question."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property

from outbox.testing.records import Counted, Entry, Key, Promised, Reconciled
from outbox.testing.seen import Fate, Handed, Lease, Overlap, Side, State, Transaction, Wait, Write

__all__ = ["Facts"]


class Facts:
    """Everything a history says. Built by `fold`, and not changed afterwards."""

    def __init__(self) -> None:
        self.promised = Promised()
        self.sides: dict[str, Side] = {}
        self.transactions: dict[str, Transaction] = {}
        self.writes: dict[int, Write] = {}
        self.given_again: list[Write] = []
        self.undone: set[int] = set()
        self.leases: dict[tuple[str, int], Lease] = {}
        self.overlaps: list[Overlap] = []
        self.late: list[Overlap] = []
        self.crowded: list[tuple[str, Handed]] = []
        self.fell: list[tuple[str, str, Key, State, State]] = []
        self.unlike: list[tuple[str, str, Entry]] = []
        self.faults: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.fired: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()
        self.waits: list[Wait] = []
        self.asked_about: dict[str, tuple[int, ...]] = {}
        self.damaged: dict[str, set[Key]] = defaultdict(set)
        self.reconciled: list[tuple[Reconciled, list[Key]]] = []
        self.pruning = False
        self.pruned: dict[int, int] = {}
        self.counted: list[Counted] = []
        self.last_fault = self.last_write = self.last_effect = self.drained = 0
        self.kept: set[int] = set()
        self.others: dict[int, Entry] = {}
        self.rows: dict[Key, str] = {}
        self.dumped = self.rows_read = False
        self.records = 0

    def side(self, backend_id: str) -> Side:
        """Return what is known of a secondary."""
        if (side := self.sides.get(backend_id)) is None:
            side = self.sides[backend_id] = Side(backend_id)
        return side

    def fate(self, position: int) -> Fate:
        """Return what became of an event's transaction; the final tables decide where its writer never knew."""
        write = self.writes.get(position)
        return Fate.UNHEARD if write is None else write.fate

    def owed(self) -> Iterator[tuple[Side, Write]]:
        """Yield every event that certainly committed, with each secondary it is owed to that still takes part."""
        everybody = tuple(self.sides)
        for write in self.writes.values():
            if write.fate is Fate.COMMITTED:
                for backend_id in write.backend_ids or everybody:
                    side = self.side(backend_id)
                    if side.registered is None or side.registered.status != "removed":
                        yield side, write

    def done_at(self, side: Side, position: int) -> int | None:
        """Return since when a secondary has an event or what supersedes it; None when it has not."""
        key = self.key_of(position)
        return side.done_at(position, key, self.lines[key] if key else [])

    def key_of(self, position: int) -> Key | None:
        """Return the key of an event, whoever told of it."""
        if write := self.writes.get(position):
            return write.key
        entry = self.told_of.get(position)
        return entry.key if entry else None

    @cached_property
    def lines(self) -> dict[Key, list[int]]:
        """The positions of each key, rising, whoever told of them."""
        lines: dict[Key, list[int]] = defaultdict(list)
        for position, write in self.writes.items():
            lines[write.key].append(position)
        for position, entry in self.told_of.items():
            lines[entry.key].append(position)
        for line in lines.values():
            line.sort()
        return lines

    @cached_property
    def pending(self) -> dict[str, Counter[int]]:
        """By secondary: how often each position is owed in the final tables."""
        found = {side.backend_id: Counter(side.deliveries) for side in self.sides.values()}
        for side in self.sides.values():
            found[side.backend_id].update(position for hold in side.holds for position in hold.positions)
        for lease in self.leases.values():
            if lease.row is not None and not lease.row.finished:
                found[lease.backend_id].update(lease.row.positions)
        return found

    @cached_property
    def told_of(self) -> dict[int, Entry]:
        """The events that no writer recorded, as the final tables have them, or else as they arrived."""
        found: dict[int, Entry] = {}
        for side in self.sides.values():
            found |= {position: entry for position, entry in side.strange.items() if position not in self.writes}
        return found | {position: entry for position, entry in self.others.items() if position not in self.writes}
