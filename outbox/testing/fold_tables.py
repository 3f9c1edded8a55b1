"""Fold tables: what the final tables add to the facts."""

from __future__ import annotations

import sys

from outbox.testing import records as said
from outbox.testing.facts import Facts
from outbox.testing.records import Entry, Key
from outbox.testing.seen import Lease, Row, Side, State, Write

__all__ = ["TableFolding"]


class TableFolding:
    """One method for each record of the end, named after it."""

    def __init__(self) -> None:
        self.facts = Facts()
        self._keys: dict[Key, Key] = {}

    def kept(self, record: said.Kept) -> None:
        """Compare the events that are left with what was recorded."""
        for entry in record.entries:
            self.facts.kept.add(entry.position)
            write = self.facts.writes.get(entry.position)
            if write is None:
                self.facts.others[entry.position] = entry
            else:
                self.compare("", entry, write)

    def owed(self, record: said.Owed) -> None:
        """Note deliveries."""
        self.facts.side(record.backend_id).deliveries.extend(record.positions)

    def attempted(self, record: said.Attempted) -> None:
        """Note an attempt beside what relays said of it."""
        lease = self.lease(record.backend_id, record.attempt_id)
        counts = record.counts
        done = sum(counts.get(name, 0) for name in ("applied", "stale", "superseded"))
        failed = any(counts.get(name) for name in ("lost", "retried", "released", "rejected"))
        relay_id = sys.intern(record.relay_id)
        # One object, where relay and table agree.
        positions = tuple(record.positions)
        lease.positions = positions = lease.positions if lease.positions == positions else positions
        lost = bool(counts.get("lost"))
        lease.row = Row(relay_id, record.started, record.finished, positions, done, lost, failed)

    def held(self, record: said.Held) -> None:
        """Note a hold."""
        self.facts.side(record.backend_id).holds.append(record)

    def given_up(self, record: said.GivenUp) -> None:
        """Note what was discarded."""
        self.facts.side(record.backend_id).given_up.append(record)

    def registered(self, record: said.Registered) -> None:
        """Note a secondary's terms."""
        self.facts.side(record.backend_id).registered = record

    def rows(self, record: said.Rows) -> None:
        """Note the primary's resources."""
        self.facts.rows.update((self.key_of(entry), entry.digest) for entry in record.entries)

    def contents(self, record: said.Contents) -> None:
        """Note what a secondary shows."""
        side = self.observed(record.backend_id)
        side.contents_read = True
        for entry in record.entries:
            key = self.key_of(entry)
            held = side.held.get(key)
            state = State(entry.position, entry.digest)
            side.contents[key] = held if held == state else state

    def dumped(self, record: said.Dumped) -> None:
        """Note that everything was read."""
        self.facts.dumped, self.facts.rows_read = True, record.rows

    def compare(self, backend_id: str, entry: Entry, write: Write) -> None:
        """Note what is not as its writer recorded it."""
        if write.key[0] != entry.tenant_id:
            self.facts.unlike.append(("crossed", backend_id, entry))
        elif write.key != entry.key or write.digest != entry.digest:
            self.facts.unlike.append(("altered", backend_id, entry))

    def lease(self, backend_id: str, attempt_id: int) -> Lease:
        """Return what is known of an attempt."""
        if (lease := self.facts.leases.get((backend_id, attempt_id))) is None:
            lease = self.facts.leases[backend_id, attempt_id] = Lease(backend_id, attempt_id)
        return lease

    def observed(self, backend_id: str) -> Side:
        """Return what is known of a secondary that speaks for itself."""
        side = self.facts.side(backend_id)
        side.observed = True
        return side

    def key_of(self, entry: Entry) -> Key:
        """Return the key of an entry: one object for all that are equal."""
        key = (entry.tenant_id, entry.resource_type, entry.resource_id)
        return self._keys.setdefault(key, key)
