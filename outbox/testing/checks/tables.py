"""Tables: whether counts add up, attempts stay within bounds, and comparisons report what is there."""

from __future__ import annotations

from collections import Counter

from outbox.testing.checks.verdict import Judgement, Verdict
from outbox.testing.facts import Facts
from outbox.testing.seen import Fate, Lease, Side

__all__ = ["attempts_bound", "counts_add_up", "false_drift"]

_DONE = ("applied", "stale", "superseded")


def counts_add_up(facts: Facts) -> Verdict:
    """What is owed, done and given up makes everything that was recorded; nothing is owed twice; status recounts."""
    judge = Judgement("counts")
    for each in facts.counted:
        judge.looked()
        if each.reported != each.recounted:
            judge.wrong(
                f"{each.reported} reported, {each.recounted} there", backend_id=each.backend_id, whole=("counted",)
            )
    if not facts.dumped:
        judge.lacks("the final tables")
        return judge.verdict()
    owed = _owed(facts)
    for side in facts.sides.values():
        for position, times in facts.pending[side.backend_id].items():
            if times > 1:
                judge.wrong(f"owed {times} times", backend_id=side.backend_id, positions=(position,))
        if side.registered is not None and side.registered.totals and side.registered.status != "removed":
            _totals(judge, facts, side, *owed[side.backend_id])
    return judge.verdict()


def _owed(facts: Facts) -> dict[str, tuple[int, int | None]]:
    """Return how many events each secondary was owed, at least and at most; None where nobody can know."""
    least: Counter[str] = Counter()
    perhaps: Counter[str] = Counter()
    everybody = tuple(facts.sides)
    for position, write in facts.writes.items():
        fate = facts.fate(position)
        if fate is not Fate.ROLLED_BACK:
            (least if fate is Fate.COMMITTED else perhaps).update(write.backend_ids or everybody)
    # Whom a repair or a backfill owed its events is in no record of theirs.
    others = facts.others
    return {
        name: (least[name], None if others or side.strange else least[name] + perhaps[name])
        for name, side in facts.sides.items()
    }


def _totals(judge: Judgement, facts: Facts, side: Side, least: int, most: int | None) -> None:
    assert side.registered is not None
    judge.looked()
    through, totals = side.registered.folded_through, side.registered.totals
    unfolded = [lease.row for lease in facts.leases.values() if _of(lease, side.backend_id, through)]
    done = sum(totals.get(name, 0) for name in _DONE) + sum(row.done for row in unfolded if row is not None)
    found = done + totals.get("discarded", 0) + facts.pending[side.backend_id].total()
    if found < least or (most is not None and found > most):
        expected = f"{least}" if most == least else f"{least} to {'any number' if most is None else most}"
        judge.wrong(f"{found} counted, {expected} recorded", backend_id=side.backend_id, whole=("registered",))


def _of(lease: Lease, backend_id: str, through: int) -> bool:
    return lease.backend_id == backend_id and lease.attempt_id > through


def attempts_bound(facts: Facts) -> Verdict:
    """No key had more attempts than it may, or more than there were claims of it; little is handed over again."""
    judge = Judgement("attempts")
    promised = facts.promised
    claims = _claims(facts)
    for side in facts.sides.values():
        for hold in side.holds:
            judge.looked()
            found_by = {"backend_id": side.backend_id, "key": hold.key, "positions": tuple(hold.positions)}
            if 0 < promised.most_attempts < hold.attempts:
                judge.wrong(f"{hold.attempts} attempts of {promised.most_attempts}", **found_by)
            if hold.state == "retrying" and 0 < promised.most_attempts <= hold.attempts:
                judge.wrong(f"still tried after {hold.attempts} attempts", **found_by)
            if facts.leases and hold.attempts > claims[side.backend_id, hold.key]:
                judge.wrong(f"{hold.attempts} attempts, {claims[side.backend_id, hold.key]} claims", **found_by)
    again, faults = facts.operations["again"], facts.fired.total()
    judge.looked(sum(len(side.asked) for side in facts.sides.values()))
    judge.counts["again"] = again
    if promised.most_again and again > promised.most_again * max(1, faults):
        judge.wrong(f"{again} handed over again, for {faults} faults")
    return judge.verdict()


def _claims(facts: Facts) -> Counter[tuple[str, tuple[str, str, str]]]:
    """Count the attempts of each key that is held at the end."""
    held = {(side.backend_id, hold.key) for side in facts.sides.values() for hold in side.holds}
    counts: Counter[tuple[str, tuple[str, str, str]]] = Counter()
    for lease in facts.leases.values() if held else ():
        keys = {key for position in lease.positions if (key := facts.key_of(position))}
        counts.update(held & {(lease.backend_id, key) for key in keys})
    return counts


def false_drift(facts: Facts) -> Verdict:
    """A comparison reported a key that nobody had damaged and nobody had given up."""
    judge = Judgement("false drift")
    for record, false in facts.reconciled:
        judge.looked()
        given_up = facts.side(record.backend_id).standing_for
        for key in false:
            if key not in given_up:
                judge.wrong("reported, and never damaged", backend_id=record.backend_id, key=key)
    return judge.verdict()
