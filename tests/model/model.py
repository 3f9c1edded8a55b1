"""What the system is, in dicts: no SQL, no time, no concurrency.

Read it as the semantics. `Model` is the primary with its events; `Account` is what one secondary is owed and what
became of it. The machine tells both what the real system did, and an assertion fails where it may not have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

Key = tuple[str, str]
"""A tenant and an id; the model knows one type."""

MOST_ATTEMPTS = 3
ALONE_AFTER_LOST = 2

# What an outcome leaves owed. `lost`: the lease ran out, and nobody knows.
OWED = ("retried", "rejected", "released", "lost")
DONE = ("applied", "stale")
# A secondary with one of these is owed what is recorded; one that drains still gets what it was owed before.
OWED_EVENTS = ("shadow", "live", "paused")


@dataclass(frozen=True)
class Event:
    """One committed change; `content` is None for a delete."""

    key: Key
    content: str | None
    owed_to: frozenset[str]


@dataclass
class Hold:
    """One key that is held back: what it owes beside what is in hand, and when it is due (None: in hand, or dead)."""

    owed: list[int]
    state: str
    due: bool | None
    attempts: int = 0
    lost: int = 0
    alone: bool = False


@dataclass
class Attempt:
    """What one relay has in hand. Expired, anybody else may close it as lost."""

    positions: list[int]
    expired: bool = False


@dataclass
class Account:
    """One secondary. An event that is owed is in exactly one of `waiting`, `open` and `holds`, or stood for there."""

    name: str
    log_order: bool
    tenants: tuple[str, ...]
    events: Mapping[int, Event]
    status: str = "live"
    waiting: set[int] = field(default_factory=set)
    open: dict[int, Attempt] = field(default_factory=dict)
    holds: dict[Key, Hold] = field(default_factory=dict)
    totals: Counter[str] = field(default_factory=Counter)
    owed_ever: int = 0
    # In state order a newer event stands for the older ones it superseded: they share its fate.
    stands_for: dict[int, set[int]] = field(default_factory=dict)
    fates: dict[int, str] = field(default_factory=dict)
    # Keys that may differ from the primary with nothing owed, until something newer than this arrives.
    doubtful: dict[Key, int] = field(default_factory=dict)

    @property
    def pending(self) -> int:
        return len(self.positions_owed())

    @property
    def carried(self) -> bool:
        return self.status not in ("paused", "removed")

    def positions_owed(self) -> list[int]:
        held = [position for hold in self.holds.values() for position in hold.owed]
        return [*self.waiting, *self.in_hand(), *held]

    def in_hand(self) -> list[int]:
        return [position for attempt in self.open.values() for position in attempt.positions]

    def keys(self, positions: Iterable[int]) -> set[Key]:
        return {self.events[position].key for position in positions}

    def owe(self, position: int) -> None:
        self.waiting.add(position)
        self.owed_ever += 1

    def due(self) -> set[Key]:
        """The keys that a claim with room finds, but for those that must go alone."""
        busy = self.keys(self.in_hand())
        held = {key for key, hold in self.holds.items() if hold.due and not hold.alone}
        return (held | {key for key in self.keys(self.waiting) if key not in self.holds}) - busy

    def claim(self, taken: set[int], opened: Mapping[int, list[int]]) -> None:
        """Learn which deliveries a claim took, and which attempts it opened of them and of what was held and due.

        Of a key the oldest come first, and none while one is in hand. What is held absorbs its key's deliveries.
        """
        for position in taken:
            key = self.events[position].key
            earlier = {each for each in self.waiting - taken if each < position and self.events[each].key == key}
            assert not earlier, f"{position} was claimed before {earlier}"
        self.waiting -= taken
        fresh = {position for position in taken if self.events[position].key not in self.holds}
        revived = [self._absorb(position) for position in sorted(taken - fresh)]
        out = {position for positions in opened.values() for position in positions}
        going = {position for hold in self.holds.values() for position in self._take(hold, out, len(out))}
        assert out == fresh | going, f"in hand is {out}, not {fresh} and {going}"
        assert all(hold is None or hold.due is None for hold in revived), "what a newer event revived was not taken"
        for attempt_id, positions in opened.items():
            busy = self.keys(self.in_hand()) & self.keys(positions)
            assert not busy, f"two attempts have {busy} in hand"
            self.open[attempt_id] = Attempt(sorted(positions))

    def settle(self, attempt_id: int, results: Mapping[int, str]) -> bool:
        """Close an attempt and record its outcomes; False, and nothing happens, if somebody else closed it."""
        if (attempt := self.open.pop(attempt_id, None)) is None:
            return False
        self.totals.update(results.values())
        for key in sorted(self.keys(attempt.positions)):
            self._settle_key(key, [each for each in attempt.positions if self.events[each].key == key], results)
        return True

    def lose(self, attempt_id: int) -> None:
        """A relay took over what another left behind. In state order only the newest event of a key was owed."""
        self.settle(attempt_id, self.alike(self.open[attempt_id].positions, "lost"))

    def alike(self, positions: list[int], result: str) -> dict[int, str]:
        newest = {self.events[position].key: position for position in sorted(positions)}
        passed = set() if self.log_order else {*positions} - {*newest.values()}
        return {position: "superseded" if position in passed else result for position in positions}

    def redrive(self) -> int:
        chosen = self.failures()
        for key in chosen:
            hold = self.holds[key]
            hold.state, hold.due, hold.attempts, hold.lost = "released", True, 0, 0
        return len(chosen)

    def discard(self) -> int:
        chosen = self.failures()
        for key in chosen:
            self._give_up(self.holds.pop(key).owed)
        return len(chosen)

    def write_off(self) -> None:
        """The secondary was removed: it gets nothing more, and whoever has something in hand settles nothing."""
        self._give_up(self.positions_owed())
        self.waiting, self.open, self.holds, self.status = set(), {}, {}, "removed"

    def doubt(self, key: Key) -> None:
        """It may hold anything of this key until something newer than all that was recorded arrives."""
        self.doubtful[key] = max(self.events, default=0)

    def told(self, position: int) -> str:
        """What became of an event, as whoever waits for it must be told."""
        if fate := self.fates.get(position):
            return "removed" if fate == "discarded" and self.status == "removed" else fate
        # A failure of an older event says nothing of one that still waits behind it.
        hold = None if position in self.waiting else self.holds.get(self.events[position].key)
        if hold and hold.state == "dead":
            return "dead"
        if self.status == "paused":
            return "paused"
        return "failing" if hold and hold.state == "retrying" else "accepted"

    def _absorb(self, position: int) -> Hold | None:
        """Let a hold take a newer event of its key in; return the hold if that revived it and it must go out."""
        hold = self.holds[self.events[position].key]
        if self.log_order:
            hold.owed.append(position)
            return None
        dead = hold.state == "dead"
        self._supersede(hold.owed[0], position)
        self.totals["superseded"] += 1
        # A newer event has all its attempts before it.
        hold.owed, hold.attempts, hold.lost = [position], 0, 0
        if dead:
            hold.state, hold.due = "released", True
        return hold if dead and not hold.alone else None

    def _take(self, hold: Hold, out: set[int], size: int) -> list[int]:
        """Learn what of a hold went out: nothing, or the oldest of it."""
        going = [position for position in hold.owed if position in out]
        if going:
            assert hold.due, f"{going} is held and was not due"
            assert going == hold.owed[: len(going)], f"{going} went out before {hold.owed}"
            assert not hold.alone or size == 1, f"{going} may have killed its relay and did not go alone"
            hold.owed, hold.due = hold.owed[len(going) :], None
        return going

    def _settle_key(self, key: Key, positions: list[int], results: Mapping[int, str]) -> None:
        held = self.holds.pop(key, None) or Hold([], "released", None)
        for position in positions:
            if results[position] == "superseded":
                self._supersede(position, positions[-1])
            elif results[position] in DONE:
                self._finish(position, "applied")
        sent = [position for position in positions if results[position] != "superseded"]
        owed = [position for position in sent if results[position] in OWED]
        if owed:
            # Attempts are those of the event at the head.
            before = held if owed[0] == sent[0] else Hold([], "released", None)
            self.holds[key] = _held_back(owed + held.owed, results[owed[0]], before)
        elif held.owed:
            self.holds[key] = Hold(held.owed, "released", due=True)

    def failures(self) -> list[Key]:
        """What an operator may touch: what failed, and is not in hand just now."""
        return [
            key
            for key, hold in self.holds.items()
            if hold.state == "dead" or (hold.state == "retrying" and hold.due is not None)
        ]

    def _supersede(self, older: int, newer: int) -> None:
        self.stands_for.setdefault(newer, set()).update(self.stands_for.pop(older, set()) | {older})

    def _give_up(self, positions: list[int]) -> None:
        self.totals["discarded"] += len(positions)
        for position in positions:
            self.doubt(self.events[position].key)
            self._finish(position, "discarded")

    def _finish(self, position: int, fate: str) -> None:
        for each in {position} | self.stands_for.pop(position, set()):
            self.fates[each] = fate
        key = self.events[position].key
        if fate == "applied" and position > self.doubtful.get(key, position):
            del self.doubtful[key]


def _held_back(owed: list[int], result: str, before: Hold) -> Hold:
    """A release costs nothing and is due at once; a failure or a loss spends an attempt of the event at the head."""
    if result == "released":
        state = "retrying" if before.attempts else "released"
        return Hold(owed, state, True, before.attempts, before.lost, before.lost >= ALONE_AFTER_LOST)
    attempts, lost = before.attempts + 1, before.lost + (result == "lost")
    dead = result == "rejected" or attempts >= MOST_ATTEMPTS
    alone = lost >= ALONE_AFTER_LOST
    return Hold(owed, "dead" if dead else "retrying", None if dead else False, attempts, lost, alone)


class Model:
    """The primary: its rows, and every event that was ever committed, the pruned ones included."""

    def __init__(self, **accounts: tuple[bool, tuple[str, ...]]) -> None:
        self.rows: dict[Key, str] = {}
        self.events: dict[int, Event] = {}
        self.kept: set[int] = set()
        self.accounts = {name: Account(name, *terms, self.events) for name, terms in accounts.items()}

    def owed_to(self, key: Key) -> frozenset[str]:
        """Who is owed what is recorded now."""
        return frozenset(
            each.name for each in self.accounts.values() if each.status in OWED_EVENTS and key[0] in each.tenants
        )

    def owed_to_only(self, name: str) -> frozenset[str]:
        """Who is owed what is recorded now for one secondary."""
        return frozenset({name} if self.accounts[name].status in OWED_EVENTS else ())

    def commit(self, position: int, event: Event) -> None:
        """An event is there if and only if its change is, with one delivery for everybody who wants it."""
        self.events[position] = event
        self.kept.add(position)
        for account in self.accounts.values():
            if account.name in event.owed_to:
                account.owe(position)
            elif account.status in ("draining", "removed"):
                account.doubtful[event.key] = position

    def told(self, name: str, position: int) -> str:
        return self.accounts[name].told(position) if position in self.kept else "pruned"

    def failures(self) -> bool:
        return any(account.failures() for account in self.accounts.values())

    def prune(self) -> None:
        """Forget what nobody is owed."""
        self.kept &= {position for account in self.accounts.values() for position in account.positions_owed()}

    def drift(self, name: str, holds: Mapping[Key, str]) -> set[Key]:
        """The keys that a comparison must find, given what a secondary holds: those that differ with nothing owed."""
        account = self.accounts[name]
        settling = account.keys(account.positions_owed())
        return {
            key
            for key in (self.rows.keys() | holds.keys()) - settling
            if key[0] in account.tenants and self.rows.get(key) != holds.get(key)
        }
