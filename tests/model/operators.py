"""What operators do, what time does, and what those are told who ask."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from outbox import SyncToken
from outbox.backfill import BackfillProgress
from outbox.errors import StillOwed, UnknownSecondary
from outbox.housekeeping import Housekeeper
from outbox.operate import Which
from tests.comparing import said
from tests.model.ground import FORGETFUL
from tests.model.model import OWED_EVENTS, Event, Key
from tests.model.world import A_NAME, World

_AT_ONCE = timedelta(0)
_LEASE_OVER = "update outbox_attempt set lease_until = now() - interval '1 s' where attempt_id = $1"
_DUE = """
update outbox_hold set next_attempt_at = now() - interval '1 s'
where backend_id = $1 and tenant_id = $2 and resource_id = $3
"""
_PROBE = "update outbox_secondary set breaker_until = now() - interval '1 s' where breaker_until is not null"


class Operators(World):
    """The rules of operators, of time, and of whoever waits."""

    # Time passes for one thing at a time.

    @precondition(lambda self: any(each.open for each in self.model.accounts.values()))
    @rule(data=st.data())
    def let_a_lease_run_out(self, data: st.DataObject) -> None:
        leases = [(name, each) for name, account in self.model.accounts.items() for each in account.open]
        name, attempt_id = data.draw(st.sampled_from(leases))
        self.lease_over(name, attempt_id)

    @precondition(lambda self: self.waiting_holds())
    @rule(data=st.data())
    def let_a_hold_fall_due(self, data: st.DataObject) -> None:
        self.hold_due(*data.draw(st.sampled_from(self.waiting_holds())))

    @precondition(lambda self: self.refused)
    @rule()
    def let_breakers_be_probed(self) -> None:
        self.run(self.ground.pass_time(_PROBE))

    def lease_over(self, name: str, attempt_id: int) -> None:
        self.run(self.ground.pass_time(_LEASE_OVER, attempt_id))
        self.model.accounts[name].open[attempt_id].expired = True

    def hold_due(self, name: str, key: Key) -> None:
        self.run(self.ground.pass_time(_DUE, name, *key))
        self.model.accounts[name].holds[key].due = True

    def waiting_holds(self) -> list[tuple[str, Key]]:
        return [
            (name, key)
            for name, account in self.model.accounts.items()
            for key, hold in account.holds.items()
            if hold.due is False
        ]

    # Operators.

    @precondition(lambda self: self.model.failures())
    @rule(name=A_NAME)
    def redrive(self, name: str) -> None:
        assert self.run(self.manager.redrive(Which(name))) == self.model.accounts[name].redrive()

    @precondition(lambda self: self.model.failures())
    @rule(name=A_NAME)
    def discard(self, name: str) -> None:
        given_up = self.run(self.manager.discard(Which(name), reason="the test gives it up"))
        assert given_up == self.model.accounts[name].discard()
        self.tally["discarded"] += given_up

    @precondition(lambda self: self.model.kept)
    @rule()
    def tidy(self) -> None:
        """Fold attempts into the totals, and forget all that may be forgotten."""
        self.run(Housekeeper(self.ground.primary, FORGETFUL, {name for name, _ in self.carriers}).tidy())
        before = len(self.model.kept)
        self.model.prune()
        self.tally["pruned"] += before - len(self.model.kept)

    # Whoever relies on the registry waits for open transactions, and so would most of these.

    @precondition(lambda self: self.slow is None and self.model.kept)
    @rule(name=A_NAME, what=st.sampled_from(["pause", "pause", "drain", "remove", "discard"]))
    def move_on(self, name: str, what: str) -> None:
        """Pause a secondary, let it go, or take the next step back to where it was."""
        status = self.model.accounts[name].status
        if status == "paused" and what == "pause":
            self.turn(name, "live", self.manager.resume)
        elif status in ("draining", "removed"):
            self.turn(name, "shadow", self.join)
        elif status == "shadow" and what == "pause":
            self.turn(name, "live", self.manager.promote)
        elif what == "pause":
            self.turn(name, "paused", self.manager.pause)
        elif what == "drain":
            self.turn(name, "draining", self.manager.drain)
        else:
            self.remove(name, discard=what == "discard")

    def turn(self, name: str, status: str, turn: Callable[[str], Coroutine[Any, Any, None]]) -> None:
        self.run(turn(name))
        self.model.accounts[name].status = status

    async def join(self, name: str) -> None:
        """It comes back as a shadow, which missed events."""
        await self.manager._join(self.registrations[name], lambda _: None)

    def remove(self, name: str, *, discard: bool) -> None:
        account, removal = self.model.accounts[name], self.manager.remove(name, discard=discard)
        if account.pending and not discard:
            with pytest.raises(StillOwed):
                self.run(removal)
            return
        assert self.run(removal).given_up == account.pending
        account.write_off()

    @precondition(lambda self: self.slow is None and self.model.rows)
    @rule(name=A_NAME)
    def backfill_a_page(self, name: str) -> None:
        """Two resources, and then it is cut off."""
        self.backfilled(name, _cut_off_after_a_page())

    def backfilled(self, name: str, told: Callable[[BackfillProgress], None]) -> None:
        backfill = self.manager.backfill(name, most_owed=None, rate=20, progress=told)
        account = self.model.accounts[name]
        if account.status not in OWED_EVENTS:
            with pytest.raises(UnknownSecondary):
                self.run(backfill)
            return
        with suppress(_CutOff):
            self.run(backfill)
        for key in self.recorded_for(name):
            assert key[0] in account.tenants
            assert key in self.model.rows

    # The proof.

    @precondition(lambda self: self.model.kept)
    @rule(name=A_NAME, repair=st.booleans())
    def reconcile(self, name: str, repair: bool) -> None:
        # A repair waits for who has a row, or may have recorded before it.
        self.reconciled(name, repair=repair and self.slow is None)

    @precondition(lambda self: any(each.held for each in self.secondaries.values()))
    @rule(data=st.data(), loses=st.booleans())
    def damage(self, data: st.DataObject, loses: bool) -> None:
        """Somebody changes a secondary behind our back, or takes a resource out of it."""
        places = [(name, key) for name, each in self.secondaries.items() for key in each.held]
        name, place = data.draw(st.sampled_from(places))
        held, key = self.secondaries[name].held, (place[0], place[2])
        if loses:
            del held[place], self.seen[name][key]
        else:
            held[place] = msgspec.structs.replace(held[place], content=said("not what was written"))
        self.model.accounts[name].doubt(key)
        self.tally["damaged"] += 1

    def reconciled(self, name: str, *, repair: bool) -> None:
        """Compare: what differs with nothing owed is found, and nothing else; a repair records an event for each."""
        shown = self.secondaries[name].contents()
        drift = self.model.drift(name, shown)
        result = self.run(self.manager.reconcile(name, repair=repair, patience=_AT_ONCE))
        assert result.missing == len(drift - shown.keys())
        assert result.extra == len(drift - self.model.rows.keys())
        assert result.stale + result.altered == len(drift & shown.keys() & self.model.rows.keys())
        assert sorted(self.recorded_for(name)) == (sorted(drift) if repair else [])
        self.tally["drift"] += len(drift)

    def recorded_for(self, name: str) -> list[Key]:
        """Learn the events recorded for one secondary only, and return whose; each must be the primary's state."""
        found = self.run(self.ground.events())
        new = {position: found[position] for position in sorted(found.keys() - self.model.events.keys())}
        owed_to = self.model.owed_to_only(name)
        for position, (key, content) in new.items():
            assert content == self.model.rows.get(key)
            self.committed(position, Event(key, content, owed_to))
        return [key for key, _ in new.values()]

    # Whoever waits.

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.tokens))
        for name in token.backend_ids:
            positions = [position for each in token.owed_to(name) for position in each.positions]
            told = {self.model.told(name, position) for position in positions}
            state = self.answer(token, name)
            assert state in told, f"{token.positions} on {name}: {state}, not one of {told}"
            assert state != "applied" or told == {"applied"}

    @precondition(lambda self: self.undone or (self.slow and self.slow.tokens))
    @rule(data=st.data())
    def ask_for_what_is_not_committed(self, data: st.DataObject) -> None:
        token = data.draw(st.sampled_from(self.undone + (self.slow.tokens if self.slow else [])))
        for name in token.backend_ids:
            assert self.answer(token, name) in ("uncommitted", "rolled_back", "pruned")

    def answer(self, token: SyncToken, name: str) -> str:
        status = self.run(self.manager.wait_for_sync(token, timeout=0, backends=[name]))[name]
        # Whether something newer went in an event's stead is told only as long as attempts are kept.
        state = str(status.state).replace("superseded", "applied")
        assert status.synced == (state == "applied")
        self.tally[f"told {state}"] += 1
        return state


class _CutOff(Exception): ...


def _cut_off_after_a_page() -> Callable[[BackfillProgress], None]:
    began: list[int] = []

    def told(progress: BackfillProgress) -> None:
        began.append(progress.recorded)
        if progress.recorded > began[0]:
            raise _CutOff

    return told
