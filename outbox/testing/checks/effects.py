"""Effects: what arrived at the secondaries that should not have, and what went backwards there."""

from __future__ import annotations

from collections.abc import Iterator

from outbox.testing.checks.verdict import Judgement, Verdict
from outbox.testing.facts import Facts
from outbox.testing.records import Key
from outbox.testing.seen import Fate, Side, State

__all__ = ["altered", "cross_tenant", "phantom", "regressed", "resurrected"]


def phantom(facts: Facts) -> Verdict:
    """Delivered, or kept as an event, though its transaction was rolled back or never recorded it.

    An event without a writer is a repair's or a backfill's: it must be in the outbox, or carry what somebody wrote to
    its key. An unknown commit may be either, unless the final tables tell.
    """
    judge = Judgement("phantom")
    contents = {(write.key, write.digest) for write in facts.writes.values()} if _unheard(facts) else set()
    for side in facts.sides.values():
        judge.looked(len(side.asked))
        for position in sorted(side.asked | side.first.keys()):
            fate = facts.fate(position)
            if fate is Fate.ROLLED_BACK:
                write = facts.writes[position]
                found_by = {"positions": (position,), "transactions": (write.transaction.name,)}
                judge.wrong("delivered, and never committed", backend_id=side.backend_id, **found_by)
            elif fate is Fate.UNKNOWN:
                judge.counts["recovered"] += 1
            elif fate is Fate.UNHEARD and position not in facts.kept:
                entry = side.strange[position]
                if (entry.key, entry.digest) not in contents:
                    _stranger(judge, facts, side, position)
    for position in facts.kept & facts.writes.keys():
        if facts.fate(position) is Fate.ROLLED_BACK:
            transaction = facts.writes[position].transaction.name
            judge.wrong("kept as an event, and rolled back", positions=(position,), transactions=(transaction,))
    return judge.verdict()


def _unheard(facts: Facts) -> bool:
    return any(side.strange.keys() - facts.writes.keys() for side in facts.sides.values())


def _stranger(judge: Judgement, facts: Facts, side: Side, position: int) -> None:
    """A repair may delete what no writer wrote; when it was pruned since, nobody can tell any more."""
    if facts.pruning or not facts.dumped:
        judge.lacks("who recorded events that were delivered and are gone")
    else:
        judge.wrong("delivered, and nobody recorded it", backend_id=side.backend_id, positions=(position,))


def altered(facts: Facts) -> Verdict:
    """Arrived with another type, id or content than it was recorded with."""
    return _unlike(facts, "altered", "arrived otherwise than it was recorded")


def cross_tenant(facts: Facts) -> Verdict:
    """Arrived under, or is shown to, another tenant than it was recorded for."""
    judge = Judgement("cross-tenant")
    for side, key, shown in _shown(facts):
        write = facts.writes.get(shown.position)
        if write is not None and write.key[0] != key[0]:
            judge.wrong("shown to another tenant", backend_id=side.backend_id, positions=(shown.position,))
    return _unlike(facts, "crossed", "arrived under another tenant", judge)


def _unlike(facts: Facts, how: str, text: str, judge: Judgement | None = None) -> Verdict:
    judge = judge or Judgement(how)
    judge.looked(facts.operations["asked"] + facts.operations["applied"])
    for kind, backend_id, entry in facts.unlike:
        if kind == how:
            judge.wrong(text, backend_id=backend_id, positions=(entry.position,))
    return judge.verdict()


def regressed(facts: Facts) -> Verdict:
    """A secondary went from a newer state of a key to an older one."""
    judge = _fell(facts, "regressed", "went back to an older state")
    for side, key, shown in _shown(facts):
        held = side.held.get(key)
        if held is not None and held.digest and shown.position < held.position:
            found_by = {"positions": (held.position, shown.position), "key": key}
            judge.wrong("shows an older state than it took", backend_id=side.backend_id, **found_by)
    return judge.verdict()


def resurrected(facts: Facts) -> Verdict:
    """What was deleted came back by an older event."""
    judge = _fell(facts, "resurrected", "came back after its delete")
    for side, key, shown in _shown(facts):
        held = side.held.get(key)
        if held is not None and not held.digest and shown.position <= held.position:
            found_by = {"positions": (held.position, shown.position), "key": key}
            judge.wrong("is shown after its delete", backend_id=side.backend_id, **found_by)
    return judge.verdict()


def _fell(facts: Facts, how: str, text: str) -> Judgement:
    judge = Judgement(how)
    judge.looked(facts.operations["applied"])
    for kind, backend_id, key, before, after in facts.fell:
        if kind == how:
            found_by = {"positions": (before.position, after.position), "key": key}
            judge.wrong(text, backend_id=backend_id, **found_by)
    return judge


def _shown(facts: Facts) -> Iterator[tuple[Side, Key, State]]:
    """Yield what the secondaries show at the end."""
    for side in facts.sides.values():
        for key, state in side.contents.items():
            yield side, key, state
