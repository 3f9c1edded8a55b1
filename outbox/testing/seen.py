"""Seen: what a history says of one transaction, event, call, attempt, wait or secondary."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

import msgspec

from outbox.testing.records import Entry, GivenUp, Held, Key, Registered

__all__ = [
    "Call",
    "Closing",
    "Fate",
    "Handed",
    "Lease",
    "Overlap",
    "Row",
    "Side",
    "State",
    "Transaction",
    "Wait",
    "Write",
]

_FOREVER = 2**63


class Fate(StrEnum):
    """What became of the transaction that recorded an event."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled_back"
    UNKNOWN = "unknown"
    """It may be either, and nothing that was seen later tells."""
    UNHEARD = "unheard"
    """No writer in the history recorded it."""


class Transaction(msgspec.Struct, gc=False):
    """One transaction of a writer; without an ending its outcome is unknown."""

    name: str
    began: int = 0
    ended: int = 0
    how: str = "unknown"
    proved: bool = False


class Write(msgspec.Struct, gc=False):
    """One event, as its writer recorded it."""

    position: int
    key: Key
    digest: str
    transaction: Transaction
    backend_ids: tuple[str, ...]
    fate: Fate = Fate.UNKNOWN


class State(NamedTuple):
    """What a secondary holds of a key; the digest of a tombstone is empty."""

    position: int
    digest: str


class Call(msgspec.Struct, gc=False):
    """One call of a secondary; `answered` is 0 while it goes on."""

    name: str
    caller: str
    attempt_id: int
    asked: int
    answered: int = 0
    how: str = ""


class Handed(msgspec.Struct, frozen=True, gc=False):
    """An event in a call."""

    call: Call
    key: Key
    position: int


class Overlap(msgspec.Struct, frozen=True):
    """One key in a call that began while an earlier one went on; or after a newer event, which is then the earlier."""

    backend_id: str
    earlier: Handed
    later: Handed


class Closing(msgspec.Struct, frozen=True, gc=False):
    """One settle of an attempt, as a relay saw it."""

    process: str
    asked: int
    counted: bool
    how: str


class Row(msgspec.Struct, frozen=True, gc=False):
    """What the tables say of an attempt: how many of its events were `done`, and whether any `failed`."""

    relay_id: str
    started: int
    finished: int
    positions: tuple[int, ...]
    done: int
    lost: bool
    failed: bool


class Lease(msgspec.Struct, gc=False):
    """One attempt, as relays and tables tell of it."""

    backend_id: str
    attempt_id: int
    process: str = ""
    positions: tuple[int, ...] = ()
    claimed: int = 0
    lease: int = 0
    closings: list[Closing] = []
    row: Row | None = None

    @property
    def held_by(self) -> tuple[str, str]:
        """The process, and the relay by the name that tables have for it; empty where unknown."""
        return (self.process, self.row.relay_id if self.row else "")

    @property
    def was_lost(self) -> bool:
        """Whether it was closed because it had run out."""
        told = self.row is not None and self.row.lost
        return told or any(each.counted and each.how == "lost" for each in self.closings)

    @property
    def closed(self) -> int | None:
        """An instant at which it was certainly still open, and closed right after; None when nobody told."""
        return min((each.asked for each in self.closings if each.counted), default=None)


class Wait(msgspec.Struct, frozen=True, gc=False):
    """Somebody was told that these secondaries have these events."""

    name: str
    told: int
    positions: tuple[int, ...]
    done: tuple[str, ...]


class Side:
    """What is known of one secondary. `observed` says whether it keeps a history of its own."""

    def __init__(self, backend_id: str) -> None:
        self.backend_id = backend_id
        self.observed = False
        self.asked: set[int] = set()
        self.again = 0
        self.newest: dict[Key, Handed] = {}
        self.running: dict[Key, list[Handed]] = {}
        self.calls: dict[str, tuple[Call, list[Key]]] = {}
        self.first: dict[int, int] = {}
        self.held: dict[Key, State] = {}
        self.strange: dict[int, Entry] = {}
        self.registered: Registered | None = None
        self.contents: dict[Key, State] = {}
        self.contents_read = False
        self.deliveries: list[int] = []
        self.holds: list[Held] = []
        self.given_up: list[GivenUp] = []
        self._reached: dict[Key, tuple[list[int], list[int]]] = {}

    @property
    def in_log_order(self) -> bool:
        """Whether every event is owed, also those that a newer one supersedes."""
        return self.registered is not None and self.registered.ordering == "log"

    @property
    def takes_part(self) -> bool:
        """Whether it must end up equal to the primary."""
        return self.registered is None or self.registered.status in ("live", "shadow", "draining")

    def done_at(self, position: int, key: Key | None, line: list[int]) -> int | None:
        """Return since when the secondary has the event's state or a newer one of its key; `line` are its positions."""
        own = self.first.get(position)
        if self.in_log_order or key is None or (own is not None and position == line[-1]):
            return own
        if key not in self._reached:
            earliest, instants = _FOREVER, []
            for each in reversed(line):
                earliest = min(earliest, self.first.get(each, _FOREVER))
                instants.append(earliest)
            self._reached[key] = (line, instants[::-1])
        positions, since = self._reached[key]
        found = since[bisect_left(positions, position)]
        return None if found == _FOREVER else found

    @cached_property
    def standing_for(self) -> dict[Key, list[tuple[int, int, str]]]:
        """By key: from which position to which one somebody answers for them, and as what."""
        spans: dict[Key, list[tuple[int, int, str]]] = defaultdict(list)
        for hold in self.holds:
            # A hold without positions has them in hand, where they are found by the attempt.
            spans[hold.key].append((hold.oldest, max(hold.positions, default=_FOREVER), hold.state))
        for each in self.given_up:
            spans[each.key].append((each.oldest, each.position, "discarded"))
        return spans
