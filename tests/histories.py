"""Histories by hand: a run that went well, told in a few words, which a test then makes go wrong."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from outbox.testing import records as said
from outbox.testing.checker import Report, check
from outbox.testing.checks.verdict import Answer
from outbox.testing.records import Entry, Record

INDEX = "index"
SECOND = 1_000_000_000


class Tale:
    """Tells what happened, one record at a time, each a millisecond after the last."""

    def __init__(self, *backend_ids: str) -> None:
        self.records: list[Any] = []
        self.backend_ids = backend_ids or (INDEX,)
        self.now = 0
        for name in self.backend_ids:
            self.say(said.Opened(pid=1, role="secondary", backend_id=name))

    def say(self, record: Record) -> Tale:
        """Add a record; without an instant of its own it happens now."""
        self.now += 1_000_000
        self.records.append(replace(record, at=record.at or self.now, process=record.process or "teller"))
        return self

    def write(self, *entries: Entry, how: str = "committed", to: tuple[str, ...] = (), name: str = "") -> Tale:
        """A transaction records events, and ends if it is told how."""
        name = name or f"t{entries[0].position}"
        self.say(said.Began(transaction=name))
        self.say(said.Recorded(transaction=name, entries=list(entries), backend_ids=list(to)))
        return self.say(said.Ended(transaction=name, how=how)) if how else self

    def ask(self, *entries: Entry, call: str = "", caller: str = "", attempt: int = 0, on: str = INDEX) -> Tale:
        """A secondary is asked to apply."""
        call = call or f"c{entries[0].position}"
        return self.say(said.Asked(backend_id=on, call=call, entries=list(entries), caller=caller, attempt_id=attempt))

    def apply(self, *entries: Entry, call: str = "", on: str = INDEX) -> Tale:
        """It takes effect."""
        return self.say(said.Applied(backend_id=on, call=call or f"c{entries[0].position}", entries=list(entries)))

    def answer(self, call: str, how: str = "answered", on: str = INDEX) -> Tale:
        """The call is over."""
        return self.say(said.Answered(backend_id=on, call=call, how=how))

    def deliver(self, *entries: Entry, call: str = "", on: str = INDEX, **asked: Any) -> Tale:
        """A whole call that goes well."""
        call = call or f"c{entries[0].position}"
        return self.ask(*entries, call=call, on=on, **asked).apply(*entries, call=call, on=on).answer(call, on=on)

    def claim(self, attempt: int, *positions: int, by: str = "r1", on: str = INDEX, lease: int = 0) -> Tale:
        """A relay claims."""
        record = said.Claimed(backend_id=on, attempt_id=attempt, positions=list(positions), process=by, lease=lease)
        return self.say(record)

    def settle(
        self, attempt: int, by: str = "r1", *, counted: bool = True, how: str = "", on: str = INDEX, asked: int = 0
    ) -> Tale:
        """A relay settles."""
        asked = asked or self.now + 1
        record = said.Settled(backend_id=on, attempt_id=attempt, asked=asked, counted=counted, how=how, process=by)
        return self.say(record)

    def attempted(
        self,
        attempt: int,
        *positions: int,
        started: int,
        finished: int = 0,
        by: str = "r1",
        on: str = INDEX,
        **counts: int,
    ) -> Tale:
        """An attempt as the tables have it in the end."""
        record = said.Attempted(
            backend_id=on,
            attempt_id=attempt,
            relay_id=by,
            positions=list(positions),
            started=started,
            finished=finished,
            counts=counts,
        )
        return self.say(record)

    def told(self, *positions: int, done: tuple[str, ...] = (INDEX,), wait: str = "w1") -> Tale:
        """Somebody asks, and is told at once."""
        self.say(said.Waiting(wait=wait, positions=list(positions), backend_ids=list(done)))
        return self.say(said.Told(wait=wait, done=list(done)))

    def end(
        self,
        *kept: Entry,
        rows: tuple[Entry, ...] | None = None,
        shown: dict[str, tuple[Entry, ...]] | None = None,
        **registered: Any,
    ) -> Tale:
        """The final tables: these events, and what follows from them unless it is said otherwise."""
        last = {entry.key: entry for entry in sorted(kept, key=lambda entry: entry.position)}
        live = tuple(entry for entry in last.values() if entry.digest)
        if kept:
            self.say(said.Kept(entries=list(kept)))
        self.say(said.Rows(entries=list(live if rows is None else rows)))
        for name in self.backend_ids:
            self.say(said.Registered(backend_id=name, **registered))
            self.say(said.Contents(backend_id=name, entries=list((shown or {}).get(name, live))))
        return self.say(said.Dumped())

    def report(self) -> Report:
        """What the checker says."""
        return check(self.records)

    def answers(self) -> dict[str, Answer]:
        """What each check says."""
        return {verdict.check: verdict.answer for verdict in self.report().verdicts}

    def wrong(self) -> set[str]:
        """The checks that find something wrong."""
        return {name for name, answer in self.answers().items() if answer is Answer.INVALID}


def state(position: int, name: str = "p", digest: str = "", tenant: str = "acme") -> Entry:
    """The state that an event at `position` gives a resource; each its own, unless it is said."""
    return Entry(position, tenant, "Patient", name, digest or f"d{position}")


def gone(position: int, name: str = "p", tenant: str = "acme") -> Entry:
    """A delete."""
    return Entry(position, tenant, "Patient", name)
