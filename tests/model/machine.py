"""The machine: all rules together, what must be true after each, and how every example ends."""

from __future__ import annotations

import sys

from hypothesis.stateful import invariant

from outbox import BackendSyncStatus
from tests.model.model import Account
from tests.model.operators import Operators
from tests.model.relays import Relays
from tests.model.world import TENANTS
from tests.model.writers import Writers

_TOTALS = ("applied", "stale", "superseded", "retried", "rejected", "lost", "discarded")
_MOST_ROUNDS = 60


class OutboxMachine(Writers, Relays, Operators):
    """Everything that may happen, in any order, to the model and to the real system alike."""

    @invariant()
    def everything_agrees(self) -> None:
        self.events_are_those_that_were_committed()
        self.what_is_owed_is_where_the_model_has_it()
        self.status_tells_it_and_counts_add_up()
        self.no_secondary_goes_backwards()

    def events_are_those_that_were_committed(self) -> None:
        expected = {position: self.model.events[position] for position in self.model.kept}
        assert self.run(self.ground.events()) == {
            position: (event.key, event.content) for position, event in expected.items()
        }

    def what_is_owed_is_where_the_model_has_it(self) -> None:
        accounts = self.model.accounts.items()
        waiting = {(name, position) for name, account in accounts for position in account.waiting}
        assert self.run(self.ground.waiting()) == waiting
        in_hand = {
            (name, each): attempt.positions for name, account in accounts for each, attempt in account.open.items()
        }
        assert self.run(self.ground.in_hand()) == in_hand
        holds = {
            (name, key): (hold.owed, hold.state, hold.due, hold.attempts, hold.lost, hold.alone)
            for name, account in accounts
            for key, hold in account.holds.items()
        }
        assert self.run(self.ground.holds()) == holds

    def status_tells_it_and_counts_add_up(self) -> None:
        for status in self.run(self.manager.all_statuses()):
            account = self.model.accounts[status.backend_id]
            self.check_status(status, account)
            assert status.total_synced + status.discarded + status.pending == account.owed_ever

    def no_secondary_goes_backwards(self) -> None:
        for name, secondary in self.secondaries.items():
            for key, position in secondary.positions().items():
                assert position >= self.seen[name].get(key, 0), f"{name} holds an older state of {key}"
                assert position in self.model.events, f"{name} holds what was never committed"
                self.seen[name][key] = position
            assert self.seen[name].keys() == secondary.positions().keys(), f"{name} forgot something"

    def check_status(self, status: BackendSyncStatus, account: Account) -> None:
        states = [hold.state for hold in account.holds.values()]
        told = (status.status, status.pending, status.in_flight, status.failing, status.dead)
        counted = (account.status, account.pending, len(account.in_hand()))
        assert told == (*counted, states.count("retrying"), states.count("dead"))
        assert {name: getattr(status, name) for name in _TOTALS} == {name: account.totals[name] for name in _TOTALS}

    # The end: writes stop, faults end, and every secondary comes to equal the primary.

    def teardown(self) -> None:
        try:
            # After a step that failed there is nothing more to be seen.
            if sys.exc_info()[0] is None:
                self.calm_down()
        finally:
            self.close()

    def calm_down(self) -> None:
        if self.slow:
            self.end(commits=False)
        self.bring_all()
        # Whoever had something in hand all the time comes back to it when all is over.
        for each in list(self.in_hand):
            if self.loaded(each):
                if each.dispatched is None:
                    self.handed_over(each, "none", set())
                self.settled(each)
        self.everything_agrees()
        for name, account in self.model.accounts.items():
            assert self.model.drift(name, self.secondaries[name].contents()) <= account.doubtful.keys()
        for name in TENANTS:
            self.make_equal(name)
        self.everything_agrees()

    def bring_all(self) -> None:
        """Let relays carry all that is owed, however often it failed before."""
        for relay in ("small", "large"):
            self.restart(relay)
        for account in self.model.accounts.values():
            if account.status == "paused":
                self.turn(account.name, "live", self.manager.resume)
        for _ in range(_MOST_ROUNDS):
            if not any(account.pending for account in self.model.accounts.values()):
                return
            self.let_all_time_pass()
            for name in TENANTS:
                self.redrive(name)
                self.carried(name, "large", "none", set())
        raise AssertionError("faults have ended, and still something is owed")

    def make_equal(self, name: str) -> None:
        """What was given up, missed or damaged is found and restored; then both sides are the same."""
        account = self.model.accounts[name]
        if account.status in ("draining", "removed"):
            self.turn(name, "shadow", self.join)
        if account.status == "shadow":
            self.backfilled(name, lambda _: None)
            self.bring_all()
        self.reconciled(name, repair=True)
        self.bring_all()
        wanted = {key: content for key, content in self.model.rows.items() if key[0] in account.tenants}
        assert self.secondaries[name].contents() == wanted

    def let_all_time_pass(self) -> None:
        """Leases run out, holds fall due, breakers may be probed."""
        self.let_breakers_be_probed()
        for account in self.model.accounts.values():
            for attempt_id in account.open:
                self.lease_over(account.name, attempt_id)
        for name, key in self.waiting_holds():
            self.hold_due(name, key)

    def close(self) -> None:
        """Leave no transaction behind, however it ended."""
        if self.slow:
            self.ground.runner.run(self.slow.writing.rollback())
