"""What relays do. A step that never comes is a crash, one that comes late is a pause."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from outbox.lease import heartbeat
from tests.model.ground import COMES_OF, REFUSING, TROUBLES, WHOLE, InHand
from tests.model.model import DONE, Account, Key
from tests.model.world import A_NAME, A_RELAY, TENANTS, VICTIMS, World


class Relays(World):
    """The rules of relays."""

    @precondition(lambda self: self.anything_owed())
    @rule(name=A_NAME, relay=A_RELAY, slots=st.integers(1, 2), hurries=st.booleans())
    def claim(self, name: str, relay: str, slots: int, hurries: bool) -> None:
        self.claimed(name, relay, slots, hurries=hurries)

    @precondition(lambda self: any(each.waiting for each in self.model.accounts.values()))
    @rule(name=A_NAME, relay=A_RELAY, data=st.data())
    def seize(self, name: str, relay: str, data: st.DataObject) -> None:
        """Claim as a caller does who waits for his own events."""
        owed = data.draw(st.sampled_from(self.tokens)).owed_to(name)
        positions = [position for each in owed for position in each.positions]
        before = self.waiting(name)
        self.took(name, before, self.run(self.ground.seize(self.carriers[name, relay], positions)))

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        each = data.draw(st.sampled_from(self.in_hand))
        self.loaded(each)

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data(), trouble=st.sampled_from(TROUBLES), victims=VICTIMS)
    def dispatch(self, data: st.DataObject, trouble: str, victims: set[str]) -> None:
        each = data.draw(st.sampled_from(self.in_hand))
        if each.dispatched is None and self.loaded(each):
            self.handed_over(each, trouble, victims)

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        """Record the outcomes; what was not dispatched is handed back."""
        each = data.draw(st.sampled_from(self.in_hand))
        if self.loaded(each):
            self.settled(each)

    @precondition(lambda self: self.anything_owed())
    @rule(name=A_NAME, relay=A_RELAY)
    def carry(self, name: str, relay: str) -> None:
        """All of it at once, as it nearly always goes."""
        self.carried(name, relay, "none", set())

    @precondition(lambda self: self.anything_owed())
    @rule(name=A_NAME, relay=A_RELAY, trouble=st.sampled_from(TROUBLES[1:]), victims=VICTIMS)
    def carry_in_trouble(self, name: str, relay: str, trouble: str, victims: set[str]) -> None:
        self.carried(name, relay, trouble, victims)

    @precondition(lambda self: self.in_hand)
    @rule(relay=A_RELAY)
    def restart(self, relay: str) -> None:
        """Another process takes a relay's place; what the first had in hand it may still come back to."""
        self.carriers |= {(name, relay): self.carrier(name, relay) for name in TENANTS}

    @precondition(lambda self: self.in_hand)
    @rule(data=st.data())
    def beat(self, data: st.DataObject) -> None:
        """A relay renews its lease, late or not: it learns whether it still has it."""
        each = data.draw(st.sampled_from(self.in_hand))
        relay_id, attempt_id = each.carrier._relay_id, each.opened.attempt_id
        terms = (self.ground.looking, "public", relay_id, each.backend_id, [attempt_id], each.carrier._config.lease)
        kept = self.run(heartbeat(*terms))
        attempt = self.model.accounts[each.backend_id].open.get(attempt_id)
        assert kept == ({attempt_id} if attempt else set())
        if attempt:
            attempt.expired = False

    def anything_owed(self) -> bool:
        return any(account.pending for account in self.model.accounts.values())

    def carried(self, name: str, relay: str, trouble: str, victims: set[str]) -> None:
        for each in self.claimed(name, relay, 1):
            assert self.loaded(each)
            self.handed_over(each, trouble, victims)
            self.settled(each)

    def claimed(self, name: str, relay: str, slots: int, *, hurries: bool = False) -> list[InHand]:
        account, carrier = self.model.accounts[name], self.carriers[name, relay]
        for attempt_id, attempt in list(account.open.items()):
            if account.carried and attempt.expired and attempt_id not in carrier.hands.attempt_ids:
                account.lose(attempt_id)
                self.tally["lost"] += 1
        before = self.waiting(name)
        taken = self.run(self.ground.claim(carrier, slots, hurries=hurries))
        self.took(name, before, taken)
        if not taken and not hurries and self.has_room(account, relay):
            due = account.due() | {key for key, hold in account.holds.items() if hold.alone and hold.due}
            assert not due, f"{due} is due and was not found"
        return taken

    def took(self, name: str, before: set[int], taken: list[InHand]) -> None:
        """Tell the model what a claim did; what it did is for the model to judge."""
        gone = before - self.waiting(name)
        in_hand = self.run(self.ground.in_hand())
        opened = {each.opened.attempt_id: in_hand[name, each.opened.attempt_id] for each in taken}
        self.tally["absorbed"] += len(gone) > sum(map(len, opened.values()))
        self.model.accounts[name].claim(gone, opened)
        self.in_hand += taken

    def has_room(self, account: Account, relay: str) -> bool:
        """Whether a claim must find what is due: nothing is wrong with the secondary, and no suspect makes it wait.

        A suspect waits for what its relay has in hand, and all else for a suspect that is out (it is not due then).
        """
        carrier = self.carriers[account.name, relay]
        suspects = any(hold.alone and hold.due is not False for hold in account.holds.values())
        waits = suspects and carrier.hands.attempt_ids
        return account.carried and not carrier.hands.strained and not waits

    def loaded(self, each: InHand) -> bool:
        """Fetch an attempt's events, unless it is no longer its relay's."""
        ours = each.opened.attempt_id in self.model.accounts[each.backend_id].open
        fetched = each.attempt is not None
        assert self.run(each.load()) == (ours or fetched)
        if not (ours or fetched):
            each.drop()
            self.in_hand.remove(each)
        return ours or fetched

    def handed_over(self, each: InHand, trouble: str, victims: set[str]) -> None:
        """Dispatch, and see that only the victims failed and that what is called done is there."""
        secondary, account = self.secondaries[each.backend_id], self.model.accounts[each.backend_id]
        secondary.have(trouble, victims)
        results = self.run(each.dispatch())
        secondary.recover()
        self.tally[trouble] += 1
        self.refused = self.refused or trouble in REFUSING
        positions = sorted(results)
        passed = {position for position, result in account.alike(positions, "").items() if result}
        failed: set[Key] = set()
        for position in positions:
            key, result = self.model.events[position].key, results[position]
            if position in passed:
                assert result == "superseded"
            elif key in failed:
                assert result == "released", f"{position} was handed over after an earlier one of {key} failed"
            else:
                struck = trouble in WHOLE or key[1] in victims
                assert result in COMES_OF[trouble if struck else "none"], f"{position} was {result} by {trouble}"
            if result in DONE:
                assert secondary.positions()[key] >= position
            elif result != "superseded":
                failed.add(key)

    def settled(self, each: InHand) -> None:
        self.run(each.settle())
        self.in_hand.remove(each)
        ours = self.model.accounts[each.backend_id].settle(each.opened.attempt_id, each.results())
        self.tally["settled" if ours else "fenced"] += 1
