"""Fold: go through a history once, line by line, and put the facts together."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from outbox.testing import records as said
from outbox.testing.facts import Facts
from outbox.testing.fold_tables import TableFolding
from outbox.testing.records import Entry, Key, Record
from outbox.testing.seen import (
    Call,
    Closing,
    Fate,
    Handed,
    Overlap,
    Side,
    State,
    Transaction,
    Wait,
    Write,
)

__all__ = ["fold"]


def fold(history: Iterable[Record]) -> Facts:
    """Return what a history says. Reads it once and holds a few hundred bytes per event."""
    folding = _Folding()
    steps: dict[type[Any], Callable[[Any], None]] = {
        getattr(said, name.title().replace("_", "")): getattr(folding, name) for name in _STEPS
    }
    for record in history:
        folding.facts.records += 1
        step = steps.get(type(record))
        if step is not None:
            step(record)
    return folding.finished()


_STEPS = (
    *("opened", "promised", "began", "recorded", "undone", "ended", "claimed", "settled"),
    *("asked", "applied", "refused", "answered", "fired", "healed", "damaged", "waiting", "told"),
    *("reconciled", "pruned", "counted", "did", "drained"),
    *("kept", "owed", "attempted", "held", "given_up", "registered", "rows", "contents", "dumped"),
)


class _Folding(TableFolding):
    """One method for each record, named after it."""

    def __init__(self) -> None:
        super().__init__()
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}
        # Of each target and fault, where in the target's faults those stand that are not over.
        self._open: dict[tuple[str, str], list[int]] = defaultdict(list)

    def opened(self, record: said.Opened) -> None:
        if record.backend_id:
            self.facts.side(record.backend_id).observed = True

    def promised(self, record: said.Promised) -> None:
        self.facts.promised = record

    def began(self, record: said.Began) -> None:
        self._transaction(record.transaction).began = record.at

    def recorded(self, record: said.Recorded) -> None:
        transaction = self._transaction(record.transaction)
        names = tuple(record.backend_ids)
        names = self._names.setdefault(names, names)
        for entry in record.entries:
            earlier = self.facts.writes.get(entry.position)
            if earlier is not None and earlier.transaction is not transaction:
                # A crash of the primary forgets positions that were drawn and never committed, and gives them again.
                self.facts.given_again.append(earlier)
                self.facts.undone.discard(entry.position)
            write = Write(entry.position, self.key_of(entry), entry.digest, transaction, names)
            self.facts.writes[entry.position] = write
        self.facts.operations["recorded"] += len(record.entries)

    def undone(self, record: said.Undone) -> None:
        self.facts.undone.update(record.positions)
        self.facts.operations["undone"] += 1

    def ended(self, record: said.Ended) -> None:
        transaction = self._transaction(record.transaction)
        transaction.ended, transaction.how = record.at, record.how
        self.facts.operations[record.how] += 1
        self.facts.last_write = max(self.facts.last_write, record.at)

    def claimed(self, record: said.Claimed) -> None:
        lease = self.lease(record.backend_id, record.attempt_id)
        lease.process, lease.claimed, lease.lease = sys.intern(record.process), record.at, record.lease
        lease.positions = tuple(record.positions)
        self.facts.operations["claimed"] += 1

    def settled(self, record: said.Settled) -> None:
        lease = self.lease(record.backend_id, record.attempt_id)
        lease.closings.append(Closing(sys.intern(record.process), record.asked, record.counted, record.how))
        self.facts.operations["settled" if record.counted else "fenced"] += 1

    def asked(self, record: said.Asked) -> None:
        side = self.observed(record.backend_id)
        call = Call(record.call, sys.intern(record.caller), record.attempt_id, record.at)
        keys = []
        for entry in record.entries:
            key, state = self._like_recorded(side, entry)
            keys.append(key)
            self._started(side, Handed(call, key, state.position))
        side.calls[record.call] = (call, keys)
        self.facts.operations["asked"] += 1

    def _started(self, side: Side, handed: Handed) -> None:
        """Note what a call begins too early or too late; whether its lease excuses it is judged later."""
        running = side.running.setdefault(handed.key, [])
        for before in running:
            if before.call is handed.call:
                self.facts.crowded.append((side.backend_id, handed))
            else:
                self.facts.overlaps.append(Overlap(side.backend_id, before, handed))
        running.append(handed)
        if handed.position in side.asked:
            side.again += 1
            return
        side.asked.add(handed.position)
        newest = side.newest.get(handed.key)
        if newest is not None and newest.position > handed.position:
            self.facts.late.append(Overlap(side.backend_id, newest, handed))
        else:
            side.newest[handed.key] = handed

    def applied(self, record: said.Applied) -> None:
        side = self.observed(record.backend_id)
        for entry in record.entries:
            key, state = self._like_recorded(side, entry)
            before = side.held.get(key)
            if before is not None and state.position < before.position:
                how = "resurrected" if state.digest and not before.digest else "regressed"
                self.facts.fell.append((how, side.backend_id, key, before, state))
            side.held[key] = state
            side.first.setdefault(state.position, record.at)
        self.facts.last_effect = max(self.facts.last_effect, record.at)
        self.facts.operations["applied"] += len(record.entries)

    def refused(self, record: said.Refused) -> None:
        self.observed(record.backend_id)
        self.facts.operations[record.why] += len(record.positions)

    def answered(self, record: said.Answered) -> None:
        side = self.observed(record.backend_id)
        call, keys = side.calls.pop(record.call, (None, ()))
        if call is None:
            return
        call.answered, call.how = record.at, record.how
        for key in keys:
            left = [handed for handed in side.running.pop(key, ()) if handed.call is not call]
            if left:
                side.running[key] = left
        self.facts.operations[record.how] += 1

    def fired(self, record: said.Fired) -> None:
        faults = self.facts.faults[record.against]
        self._open[record.against, record.fault].append(len(faults))
        faults.append((record.at, 0))
        self.facts.fired[record.fault] += 1
        self.facts.last_fault = max(self.facts.last_fault, record.at)

    def healed(self, record: said.Healed) -> None:
        faults, still = self.facts.faults[record.against], self._open[record.against, record.fault]
        if still:
            at = still.pop()
            faults[at] = (faults[at][0], record.at)
        self.facts.last_fault = max(self.facts.last_fault, record.at)

    def damaged(self, record: said.Damaged) -> None:
        side = self.facts.side(record.backend_id)
        key = self.key_of(record.entry)
        self.facts.damaged[record.backend_id].add(key)
        side.held.pop(key, None)
        if record.entry.position:
            side.held[key] = State(record.entry.position, record.entry.digest)
        self.facts.operations["damaged"] += 1
        self.facts.last_fault = max(self.facts.last_fault, record.at)

    def waiting(self, record: said.Waiting) -> None:
        self.facts.asked_about[record.wait] = tuple(record.positions)

    def told(self, record: said.Told) -> None:
        positions = self.facts.asked_about.pop(record.wait, None)
        if positions is not None and record.done:
            self.facts.waits.append(Wait(record.wait, record.at, positions, tuple(record.done)))
        self.facts.operations["synced" if record.done else "not_synced"] += 1

    def reconciled(self, record: said.Reconciled) -> None:
        damaged = self.facts.damaged[record.backend_id]
        false = [key for key in record.drift if tuple(key) not in damaged]
        self.facts.reconciled.append((record, false))
        self.facts.operations["reconciled"] += 1

    def pruned(self, record: said.Pruned) -> None:
        self.facts.pruning = True
        self.facts.pruned.update(dict.fromkeys(record.positions, record.at))
        self.facts.operations["pruned"] += 1

    def counted(self, record: said.Counted) -> None:
        self.facts.counted.append(record)
        self.facts.operations["counted"] += 1

    def did(self, record: said.Did) -> None:
        self.facts.operations[record.operation] += 1

    def drained(self, record: said.Drained) -> None:
        self.facts.drained = record.at

    def finished(self) -> Facts:
        """Return the facts, now that the final tables can say what writers never learnt."""
        facts = self.facts
        for position, write in facts.writes.items():
            if position in facts.kept:
                write.transaction.proved = True
        for position, write in facts.writes.items():
            write.fate = Fate.ROLLED_BACK if position in facts.undone else self._fate(write.transaction)
        for side in facts.sides.values():
            for position, entry in side.strange.items():
                if position in facts.writes:
                    self.compare(side.backend_id, entry, facts.writes[position])
            facts.operations["again"] += side.again
        return facts

    def _fate(self, transaction: Transaction) -> Fate:
        if transaction.how != "unknown":
            return Fate(transaction.how)
        if transaction.proved:
            return Fate.COMMITTED
        return Fate.ROLLED_BACK if self.facts.dumped and not self.facts.pruning else Fate.UNKNOWN

    def _like_recorded(self, side: Side, entry: Entry) -> tuple[Key, State]:
        """Compare what arrived with what was recorded; later, if its writer has not told of it yet."""
        write = self.facts.writes.get(entry.position)
        if write is None:
            side.strange[entry.position] = entry
            return self.key_of(entry), State(entry.position, entry.digest)
        key = self.key_of(entry)
        if write.key is key and write.digest == entry.digest:
            # One object for all who say the same.
            return key, State(write.position, write.digest)
        self.compare(side.backend_id, entry, write)
        return key, State(write.position, entry.digest)

    def _transaction(self, name: str) -> Transaction:
        if (transaction := self.facts.transactions.get(name)) is None:
            transaction = self.facts.transactions[name] = Transaction(name)
        return transaction
