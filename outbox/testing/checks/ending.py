"""Ending: whether every secondary equals the primary when all is over, how soon, and whether the run was worth it."""

from __future__ import annotations

from outbox.testing.checks.verdict import MOST_SHOWN, Judgement, Verdict
from outbox.testing.facts import Facts
from outbox.testing.records import Key
from outbox.testing.seen import Fate, Side, State

__all__ = ["converged", "equal", "vacuous"]

_SECOND = 1_000_000_000


def equal(facts: Facts) -> Verdict:
    """In the end the primary's rows are what was last committed, and every secondary shows them, at that position."""
    judge = Judgement("equality")
    if not facts.dumped:
        judge.lacks("the final tables")
        return judge.verdict()
    last = {key: _last(facts, line) for key, line in facts.lines.items()}
    if facts.rows_read:
        _primary(judge, facts, last)
    for side in facts.sides.values():
        if side.takes_part and side.contents_read:
            _secondary(judge, facts, side, last)
        elif side.takes_part:
            judge.lacks(f"what {side.backend_id} shows")
    return judge.verdict()


def _last(facts: Facts, line: list[int]) -> dict[int, str]:
    """Return what a key may end as, digest by position: its last committed event, or an unknown one after it."""
    found: dict[int, str] = {}
    for position in reversed(line):
        write = facts.writes.get(position)
        if write is not None and write.fate is not Fate.ROLLED_BACK:
            found[position] = write.digest
        elif write is None:
            found[position] = facts.told_of[position].digest
        # A repair's, and forgotten since: whatever it delivered is as good as an unknown commit.
        certain = write.fate is Fate.COMMITTED if write is not None else position in facts.others
        if certain:
            break
    return found


def _primary(judge: Judgement, facts: Facts, last: dict[Key, dict[int, str]]) -> None:
    for key, ends in last.items():
        judge.looked()
        row = facts.rows.get(key, "")
        if row not in ends.values() and not (row == "" and _only_unknown(facts, ends)):
            judge.wrong("the primary is not as its last event", key=key, positions=tuple(ends))
    for key in facts.rows.keys() - last.keys():
        judge.wrong("the primary has a row without an event", key=key)


def _only_unknown(facts: Facts, ends: dict[int, str]) -> bool:
    """Whether nothing of a key is known to have committed, so that it may never have been."""
    return all(facts.fate(position) is Fate.UNKNOWN for position in ends)


def _secondary(judge: Judgement, facts: Facts, side: Side, last: dict[Key, dict[int, str]]) -> None:
    for key, ends in last.items():
        shown = side.contents.get(key)
        if key in side.standing_for:
            judge.counts["excused by a hold"] += 1
        elif shown is not None or _wanted(facts, side, ends):
            judge.looked()
            if difference := _difference(facts, shown, ends):
                judge.wrong(difference, backend_id=side.backend_id, key=key, positions=tuple(ends))
    for key in side.contents.keys() - last.keys():
        judge.wrong("extra: nobody recorded it", backend_id=side.backend_id, key=key)


def _difference(facts: Facts, shown: State | None, ends: dict[int, str]) -> str:
    """Return how what a secondary shows differs from what it may; nothing when it does not."""
    if shown is None:
        return "" if "" in ends.values() or _only_unknown(facts, ends) else "missing"
    if ends.get(shown.position) == shown.digest:
        return ""
    if shown.digest in ends.values():
        return f"the content at another position, {shown.position}"
    return "extra" if set(ends.values()) <= {""} else "another content"


def _wanted(facts: Facts, side: Side, ends: dict[int, str]) -> bool:
    """Whether the secondary was owed the end of a key; what a repair recorded says nothing of that."""
    writes = [facts.writes.get(position) for position in ends]
    return any(write and (not write.backend_ids or side.backend_id in write.backend_ids) for write in writes)


def converged(facts: Facts) -> Verdict:
    """After the last fault and the last write everything arrived, within the time that was promised."""
    judge = Judgement("convergence")
    if not facts.dumped:
        judge.lacks("the final tables")
        return judge.verdict()
    judge.looked()
    held = [(side.backend_id, hold) for side in facts.sides.values() for hold in side.holds]
    dead = {(backend_id, each) for backend_id, hold in held if hold.state == "dead" for each in hold.positions}
    for backend_id, positions in facts.pending.items():
        if not facts.side(backend_id).takes_part:
            continue
        if left := [position for position in sorted(positions) if (backend_id, position) not in dead]:
            judge.wrong(f"{len(left)} still owed at the end", backend_id=backend_id, positions=tuple(left[:MOST_SHOWN]))
    took = (facts.drained or facts.last_effect) - max(facts.last_fault, facts.last_write)
    judge.counts["milliseconds"] = max(0, took // 1_000_000)
    if 0 < facts.promised.converge_within < took:
        judge.wrong(
            f"took {took / _SECOND:.1f} s of {facts.promised.converge_within / _SECOND:.1f}",
            whole=("promised", "drained"),
        )
    return judge.verdict()


def vacuous(facts: Facts) -> Verdict:
    """Every promised fault fired, every promised operation succeeded, as often as promised; and something happened."""
    judge = Judgement("vacuity")
    floors = {"committed": 1, "applied": 1} | facts.promised.operations
    for found, least in ((facts.operations, floors), (facts.fired, facts.promised.faults)):
        for kind, times in least.items():
            judge.looked()
            judge.counts[kind] = found[kind]
            if found[kind] < times:
                judge.wrong(f"{kind}: {found[kind]} of {times}")
    return judge.verdict()
