"""Numbers: what a run is asked to reach, and what its history says it reached."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import msgspec

from outbox.testing.records import Did, Ended, Fired, Record, Recorded, Undone

__all__ = ["NOTHING_ASKED", "NUMBERS", "Numbers", "reached", "short", "table"]

_AT_COMMIT = ("cut before commit", "cut after commit", "cut swallowed")


class Numbers(msgspec.Struct, frozen=True):
    """So many of each in so many seconds; a shorter run is asked for its share.

    `often` says how many times a second a fault strikes where that is not as usual, `poison` which share of events
    nobody takes, each of which kills its key for good: in log order nothing of it goes on after that. `connections` is
    how many a relay opens.
    """

    seconds: float
    asked: dict[str, int]
    often: dict[str, float] = {}
    poison: float = 0.002
    connections: int = 4

    def within(self, seconds: float) -> dict[str, int]:
        """Return what a run of so many seconds is asked for."""
        return {kind: max(1, int(times * seconds / self.seconds)) for kind, times in self.asked.items()}


NOTHING_ASKED = Numbers(60, {})
"""What a run is like that is to show nothing in particular."""

NUMBERS = {
    "ci": Numbers(
        600,
        {
            "relay kills": 2_000,
            "PostgreSQL crashes": 50,
            "zombie resumes": 200,
            "connections cut": 500,
            "of them at COMMIT": 100,
            "events": 50_000,
        },
    ),
    "soak": Numbers(
        5_000,
        {
            "relay kills": 10_000,
            "PostgreSQL crashes": 1_000,
            "zombie resumes": 2_000,
            "connections cut": 5_000,
            "of them at COMMIT": 1_000,
            "events": 1_000_000,
        },
        # More of the one, and fewer of the other: relays that live longer carry more.
        {"postgres": 0.225, "kill": 2.2, "cut": 1.1},
        # Of a million events as usual, nearly every key would be dead before the end, and nothing be in order any more.
        poison=0.0002,
        # A relay lives for three seconds, and to open a connection and plan everything on it takes as long as to carry.
        connections=2,
    ),
}
"""By name: what is asked of every change, and of a long run."""


def reached(history: Iterable[Record]) -> Counter[str]:
    """Return how much of each a history has; an event counts once it is known to have committed."""
    found: Counter[str] = Counter()
    open_ones: Counter[str] = Counter()
    for record in history:
        match record:
            case Fired():
                found.update(_kinds(record))
            case Did(operation="resumed"):
                found["zombie resumes"] += 1
            case Recorded():
                open_ones[record.transaction] += len(record.entries)
            case Undone():
                open_ones[record.transaction] -= len(record.positions)
            case Ended():
                events = open_ones.pop(record.transaction, 0)
                found["transactions"] += 1
                found["events"] += events if record.how == "committed" else 0
    return found


def short(asked: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Return of what there is less than was asked for."""
    return [kind for kind, times in asked.items() if found.get(kind, 0) < times]


def table(asked: Mapping[str, int], found: Mapping[str, int]) -> Iterator[str]:
    """Yield a table for people: what was asked for, and what was reached."""
    missing = short(asked, found)
    yield f"{'':<20} {'asked':>10} {'reached':>10}"
    for kind, times in asked.items():
        yield f"{kind:<20} {times:>10,} {found.get(kind, 0):>10,}{'  NOT REACHED' if kind in missing else ''}"


def _kinds(fired: Fired) -> Iterator[str]:
    fault = fired.fault.partition(" ")[0]
    if fault == "kill" and fired.against.startswith("relay-"):
        yield "relay kills"
    if fault == "postgres":
        yield "PostgreSQL crashes"
    if fault == "cut":
        yield "connections cut"
    if fired.fault in _AT_COMMIT:
        yield "of them at COMMIT"
    yield fault
