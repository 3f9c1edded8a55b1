"""Delivery: whether what was committed arrived, was kept long enough, and was never said to be there too early."""

from __future__ import annotations

from outbox.testing.checks.verdict import Judgement, Verdict
from outbox.testing.facts import Facts
from outbox.testing.seen import Fate, Side, Wait

__all__ = ["lost", "waited_early", "wrongly_pruned"]


def lost(facts: Facts) -> Verdict:
    """Committed, and neither on the secondary, nor superseded there, nor owed, held or given up in the final tables."""
    judge = Judgement("lost")
    for side, write in facts.owed():
        if not side.observed:
            judge.lacks(f"what {side.backend_id} did")
            continue
        judge.looked()
        if write.position in side.first or facts.done_at(side, write.position) is not None:
            judge.counts["arrived"] += 1
        elif not facts.dumped:
            judge.lacks("the final tables")
        elif _visible(facts, side, write.position):
            judge.counts["visible"] += 1
        else:
            found_by = {"positions": (write.position,), "transactions": (write.transaction.name,)}
            judge.wrong("committed, and nowhere", backend_id=side.backend_id, key=write.key, **found_by)
    for write in facts.given_again:
        judge.counts["given again"] += 1
        if write.transaction.how == "committed":
            found_by = {"positions": (write.position,), "transactions": (write.transaction.name,)}
            judge.wrong("committed, and its position was given to another", key=write.key, **found_by)
    return judge.verdict()


def _visible(facts: Facts, side: Side, position: int) -> bool:
    """Whether the final tables still say that the event is owed, in hand, held or given up."""
    if position in facts.pending[side.backend_id]:
        return True
    key = facts.key_of(position)
    spans = side.standing_for.get(key, ()) if key else ()
    return any(oldest <= position <= newest for oldest, newest, _ in spans)


def wrongly_pruned(facts: Facts) -> Verdict:
    """Forgotten while somebody was owed it, or before he had it, or though nothing was ever pruned."""
    judge = Judgement("wrongly pruned")
    if not facts.dumped:
        judge.lacks("the final tables")
        return judge.verdict()
    judge.looked(len(facts.kept))
    for backend_id, positions in facts.pending.items():
        for position in positions.keys() - facts.kept:
            judge.wrong("owed, and its event is gone", backend_id=backend_id, positions=(position,))
    for side, write in facts.owed():
        position = write.position
        if position in facts.kept or not side.observed or position in facts.pending[side.backend_id]:
            continue
        judge.looked()
        done = facts.done_at(side, position)
        found_by = {"backend_id": side.backend_id, "positions": (position,), "key": write.key}
        if not facts.pruning:
            judge.wrong("gone, and nothing was ever pruned", transactions=(write.transaction.name,), **found_by)
        elif done is None and not _visible(facts, side, position):
            judge.wrong("forgotten before it arrived", transactions=(write.transaction.name,), **found_by)
        elif done is not None and done > facts.pruned.get(position, done):
            judge.wrong("arrived only after it was forgotten", **found_by)
    return judge.verdict()


def waited_early(facts: Facts) -> Verdict:
    """Somebody was told that a secondary has what it had not yet, or what never was; or he was told so of nothing."""
    judge = Judgement("waited early")
    for wait in facts.waits:
        judge.looked()
        if not wait.positions:
            judge.wrong("told of nothing", waits=(wait.name,))
        for backend_id in wait.done:
            _told(judge, facts, wait, facts.side(backend_id))
    return judge.verdict()


def _told(judge: Judgement, facts: Facts, wait: Wait, side: Side) -> None:
    if not side.observed:
        judge.lacks(f"what {side.backend_id} did")
        return
    for position in wait.positions:
        found_by = {"backend_id": side.backend_id, "positions": (position,), "waits": (wait.name,)}
        if facts.fate(position) is Fate.ROLLED_BACK:
            judge.wrong("told of what was never committed", **found_by)
            continue
        own = side.first.get(position)
        done = own if own is not None and own <= wait.told else facts.done_at(side, position)
        if done is None:
            judge.wrong("told of what never arrived", **found_by)
        elif done > wait.told:
            judge.wrong("told before it arrived", key=facts.key_of(position), **found_by)
