"""Leases: one holder at a time for each key and secondary, in commit order, and nobody else settles.

A relay that lost its lease may still be heard: killed, paused or cut off, its call arrives late and runs beside the
next holder's. That is no fault of the lease. So calls are judged by whether their caller still held the key.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from outbox.testing.checks.verdict import Judgement, Verdict
from outbox.testing.facts import Facts
from outbox.testing.records import Key
from outbox.testing.seen import Call, Handed, Lease

__all__ = ["commit_order", "double_leased", "stale_settled"]


class _Span(NamedTuple):
    """From when until when an attempt certainly was open."""

    since: int
    until: int
    lease: Lease


def double_leased(facts: Facts) -> Verdict:
    """A key in two open attempts of one secondary, or in two calls at once whose callers both held it."""
    judge = Judgement("double-leased")
    for text, spans in (("two relays held it", _claims(facts)), ("two attempts were open", _rows(facts))):
        judge.looked(len(spans))
        for key, earlier, later in _overlapping(facts, spans):
            if text != "two relays held it" or not _ran_out(earlier, later):
                _doubled(judge, text, key, earlier.lease, later.lease)
    _calls(judge, facts)
    return judge.verdict()


def _calls(judge: Judgement, facts: Facts) -> None:
    judge.looked(facts.operations["asked"])
    for backend_id, handed in facts.crowded:
        found_by = {"backend_id": backend_id, "positions": (handed.position,), "calls": (handed.call.name,)}
        judge.wrong("twice in one call", key=handed.key, **found_by)
    evidence = _Evidence(facts)
    for overlap in facts.overlaps:
        earlier, later = overlap.earlier, overlap.later
        if evidence.same_attempt(overlap.backend_id, earlier, later):
            judge.counts["one attempt"] += 1
            continue
        lost = evidence.lost(overlap.backend_id, earlier, later)
        if lost or evidence.came_late(overlap.backend_id, later, earlier):
            judge.counts["late calls of a lost lease"] += 1
        elif lost is None:
            judge.lacks("which attempts overlapping calls belong to")
        else:
            calls = (earlier.call.name, later.call.name)
            found_by = {"backend_id": overlap.backend_id, "positions": (earlier.position, later.position)}
            judge.wrong("in two calls at once", key=later.key, calls=calls, **found_by)


def stale_settled(facts: Facts) -> Verdict:
    """A settle counted though the attempt was closed, another's, or had run out and its key was claimed again."""
    judge = Judgement("stale-settled")
    for lease in facts.leases.values():
        counted = [each for each in lease.closings if each.counted]
        judge.looked(len(lease.closings))
        judge.counts["fenced"] += len(lease.closings) - len(counted)
        found_by = {"backend_id": lease.backend_id, "attempt_ids": (lease.attempt_id,)}
        if len(counted) > 1:
            judge.wrong("settled twice", **found_by)
        for each in counted:
            if each.how == "lost":
                continue
            if lease.process and each.process != lease.process:
                judge.wrong("settled by somebody else", **found_by)
            elif lease.row is not None and lease.row.lost:
                judge.wrong("settled after it was closed as lost", **found_by)
        if counted and lease.row is not None and not lease.row.finished:
            judge.wrong("settled, and still open", **found_by)
    for key, earlier, later in _overlapping(facts, _claims(facts)):
        if _ran_out(earlier, later):
            _doubled(judge, "settled after its key was claimed again", key, earlier.lease, later.lease)
    return judge.verdict()


def commit_order(facts: Facts) -> Verdict:
    """A key's positions are in commit order, and no secondary is first asked for an older one after a newer."""
    judge = Judgement("order")
    for key, line in facts.lines.items():
        judge.looked()
        soonest, newer = 2**63, 0
        for position in reversed(line):
            write = facts.writes.get(position)
            if write is None or position in facts.undone or write.transaction.how != "committed":
                continue
            began, ended = write.transaction.began, write.transaction.ended
            if began > soonest:
                transactions = (write.transaction.name, facts.writes[newer].transaction.name)
                text = "committed first, and has the higher position"
                judge.wrong(text, key=key, positions=(position, newer), transactions=transactions)
            if 0 < ended < soonest:
                soonest, newer = ended, position
    evidence = _Evidence(facts)
    for overlap in facts.late:
        lost = evidence.lost(overlap.backend_id, overlap.later, overlap.earlier)
        if lost:
            judge.counts["late calls of a lost lease"] += 1
        elif lost is None:
            judge.lacks("which attempts late calls belong to")
        else:
            positions = (overlap.earlier.position, overlap.later.position)
            calls = (overlap.earlier.call.name, overlap.later.call.name)
            found_by = {"backend_id": overlap.backend_id, "positions": positions, "calls": calls}
            judge.wrong("first asked for after a newer one", key=overlap.later.key, **found_by)
    return judge.verdict()


def _doubled(judge: Judgement, text: str, key: Key, earlier: Lease, later: Lease) -> None:
    attempt_ids = (earlier.attempt_id, later.attempt_id)
    judge.wrong(text, backend_id=earlier.backend_id, key=key, attempt_ids=attempt_ids)


def _claims(facts: Facts) -> list[_Span]:
    """As relays saw it: open from their claim until just before the settle that counted."""
    leases = (lease for lease in facts.leases.values() if lease.claimed)
    return [_Span(lease.claimed, max(lease.claimed, lease.closed or 0), lease) for lease in leases]


def _rows(facts: Facts) -> list[_Span]:
    """As the primary's clock has it, unless somebody set that clock."""
    if any(fault.startswith("clock") for fault in facts.fired):
        return []
    rows = [(lease.row, lease) for lease in facts.leases.values() if lease.row is not None]
    return [_Span(row.started, row.finished or 2**63, lease) for row, lease in rows]


def _ran_out(earlier: _Span, later: _Span) -> bool:
    """Whether the earlier one's lease was over by then, so that its settle is what should not have counted."""
    return 0 < earlier.lease.lease <= later.since - earlier.since


def _overlapping(facts: Facts, spans: list[_Span]) -> Iterable[tuple[Key, _Span, _Span]]:
    """Yield each key that two spans of one secondary share; of several, the one that lasts longest."""
    lasting: dict[tuple[str, Key], _Span] = {}
    for span in sorted(spans, key=lambda span: (span.since, span.lease.attempt_id)):
        keys = {key for position in span.lease.positions if (key := facts.key_of(position))}
        for key in keys:
            before = lasting.get((span.lease.backend_id, key))
            if before is not None and before.until > span.since:
                yield key, before, span
            if before is None or span.until > before.until:
                lasting[span.lease.backend_id, key] = span


class _Evidence:
    """What is known of the attempts that calls belong to."""

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        suspects = [*facts.overlaps, *facts.late]
        wanted = {(each.backend_id, handed.position) for each in suspects for handed in (each.earlier, each.later)}
        self._leases: dict[tuple[str, int], list[Lease]] = defaultdict(list)
        for lease in facts.leases.values():
            for position in lease.positions if wanted else ():
                if (lease.backend_id, position) in wanted:
                    self._leases[lease.backend_id, position].append(lease)

    def same_attempt(self, backend_id: str, one: Handed, other: Handed) -> bool:
        """Whether two calls are parts, or a second try, of one attempt."""
        if one.call.attempt_id and other.call.attempt_id:
            return one.call.attempt_id == other.call.attempt_id
        if not (one.call.caller and one.call.caller == other.call.caller):
            return False
        ours, theirs = ({each.attempt_id for each in self._of(backend_id, handed)} for handed in (one, other))
        return len(ours) == 1 and ours == theirs

    def lost(self, backend_id: str, handed: Handed, other: Handed) -> bool | None:
        """Whether a call's caller no longer held the key beside the other's call; None when nothing tells."""
        call, now = handed.call, max(handed.call.asked, other.call.asked)
        struck = self._facts.faults.get(call.caller, []) if call.caller else []
        if any(fired <= now and (not healed or healed >= call.asked) for fired, healed in struck):
            return True
        leases, others = self._of(backend_id, handed), self._of(backend_id, other)
        if call.how == "abandoned" or any(_ended(lease, now) for lease in leases):
            return True
        if any(_followed(lease, each) for lease in leases for each in others):
            return True
        return False if leases else None

    def came_late(self, backend_id: str, handed: Handed, other: Handed) -> bool:
        """Whether a call began when its own lease had run out, beside the call of whoever held the key by then."""
        leases, others = self._of(backend_id, handed), self._of(backend_id, other)
        return any(_ran_out_before(lease, handed.call.asked) for lease in leases) or any(
            _followed(lease, each) for lease in leases for each in others
        )

    def _of(self, backend_id: str, handed: Handed) -> list[Lease]:
        leases = self._leases[backend_id, handed.position]
        return [lease for lease in leases if _fits(lease, handed.call)]


def _fits(lease: Lease, call: Call) -> bool:
    if call.attempt_id:
        return lease.attempt_id == call.attempt_id
    return not call.caller or call.caller in lease.held_by


def _ended(lease: Lease, now: int) -> bool:
    return lease.was_lost or any(not each.counted or each.asked <= now for each in lease.closings)


def _ran_out_before(lease: Lease, now: int) -> bool:
    return any(each.counted and each.how == "lost" and each.asked <= now for each in lease.closings)


def _followed(lease: Lease, other: Lease) -> bool:
    """Whether an attempt had failed, by the primary's clock, before the other was opened."""
    if lease.row is None or other.row is None or not 0 < lease.row.finished <= other.row.started:
        return False
    return lease.row.failed
