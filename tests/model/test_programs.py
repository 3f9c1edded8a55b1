"""Programs that chance seldom writes, each told step by step; the machine says whether every step was right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outbox import waiters
from outbox.testing.postgres import PostgresServer
from tests.conftest import new_database
from tests.model.ground import Ground
from tests.model.machine import OutboxMachine

A, B = ("north", "a"), ("north", "b")


class Machine(OutboxMachine):
    """The machine with words for a program: what fails, fails for every key there is."""

    def put(self, *keys: tuple[str, str]) -> None:
        self.write(changes=[(key, "put") for key in keys])

    def fail(self, name: str, trouble: str = "retry") -> None:
        self.carried(name, "large", trouble, {"a", "b", "c"})

    def ask_for_all(self) -> None:
        for token in self.tokens:
            self.ask(data=Chosen(token))


class Chosen:
    """Stands for what chance would draw."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def draw(self, _: object) -> Any:
        return self._value


def a_superseded_event_waits_with_the_one_that_superseded_it(machine: Machine) -> None:
    machine.put(A)
    machine.fail("search")
    machine.put(A)
    machine.carry("search", "large")
    machine.hold_due("search", A)
    machine.fail("search")
    machine.ask_for_all()


def a_note_outlives_the_newest_event_it_stands_for(machine: Machine) -> None:
    machine.put(A)
    machine.backfill_a_page("search")
    machine.fail("search", "rejected")
    machine.discard("search")
    machine.tidy()
    machine.tidy()
    machine.ask_for_all()


def what_a_savepoint_undid_is_in_no_token(machine: Machine) -> None:
    machine.begin(by_hand=False)
    machine.write_slowly((A, "put"))
    machine.savepoint()
    machine.write_slowly((B, "put"))
    machine.roll_back_savepoint()
    machine.end(commits=True)


def what_is_discarded_is_told_so(machine: Machine) -> None:
    machine.put(A)
    machine.fail("search", "rejected")
    machine.discard("search")
    machine.ask_for_all()


def a_newer_event_revives_a_dead_key(machine: Machine) -> None:
    machine.put(A)
    machine.fail("search", "rejected")
    machine.put(A)
    machine.carry("search", "small")


def a_newer_event_has_all_its_attempts(machine: Machine) -> None:
    machine.put(A)
    machine.fail("search")
    machine.put(A)
    machine.carry("search", "small")


def what_was_owed_at_a_removal_is_told_so(machine: Machine) -> None:
    machine.put(A, B)
    machine.claim("archive", "small", 1, hurries=False)
    machine.move_on("archive", "discard")
    machine.ask_for_all()
    machine.settle(data=Chosen(machine.in_hand[0]))


def a_late_commit_is_found_below_later_ones(machine: Machine) -> None:
    machine.begin(by_hand=True)
    machine.write_slowly((A, "put"))
    for _ in range(3):
        machine.put(B)
        machine.carry("search", "large")
    machine.end(commits=True)
    machine.carry("search", "large")


def floors_stay_below_what_waits(machine: Machine) -> None:
    for _ in range(4):
        machine.put(A, B)
    for _ in range(4):
        machine.carry("search", "small")


def a_pause_past_the_lease_changes_nothing(machine: Machine) -> None:
    machine.put(A)
    machine.claim("search", "small", 1, hurries=False)
    (late,) = machine.in_hand
    machine.load(data=Chosen(late))
    machine.lease_over("search", late.opened.attempt_id)
    machine.carry("search", "large")
    machine.put(A)
    machine.hold_due("search", A)
    machine.carry("search", "large")
    machine.dispatch(data=Chosen(late), trouble="none", victims=set())
    machine.everything_agrees()
    machine.settle(data=Chosen(late))


def in_log_order_nothing_passes_what_failed(machine: Machine) -> None:
    machine.put(A)
    machine.put(A)
    machine.fail("archive")


def who_drains_is_owed_nothing_more(machine: Machine) -> None:
    machine.put(A)
    machine.move_on("search", "drain")
    machine.put(A)
    machine.carry("search", "large")


def a_hurried_claim_passes_by_what_is_held(machine: Machine) -> None:
    machine.put(A)
    machine.fail("search")
    machine.put(A)
    machine.claim("search", "large", 1, hurries=True)


PROGRAMS: list[Callable[[Machine], None]] = [
    a_superseded_event_waits_with_the_one_that_superseded_it,
    a_note_outlives_the_newest_event_it_stands_for,
    what_a_savepoint_undid_is_in_no_token,
    what_is_discarded_is_told_so,
    a_newer_event_revives_a_dead_key,
    a_newer_event_has_all_its_attempts,
    what_was_owed_at_a_removal_is_told_so,
    a_late_commit_is_found_below_later_ones,
    floors_stay_below_what_waits,
    a_pause_past_the_lease_changes_nothing,
    in_log_order_nothing_passes_what_failed,
    who_drains_is_owed_nothing_more,
    a_hurried_claim_passes_by_what_is_held,
]


@pytest.fixture(scope="module")
def ground(postgres: PostgresServer, template: str) -> Iterator[Ground]:
    with new_database(postgres, template) as name:
        ground = Ground(postgres.dsn(name))
        yield ground
        ground.close()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_program(ground: Ground, monkeypatch: pytest.MonkeyPatch, program: Callable[[Machine], None]) -> None:
    monkeypatch.setattr(waiters, "_FIRST_LOOK", 60.0)
    machine = Machine(ground, Counter())
    try:
        program(machine)
        machine.everything_agrees()
    finally:
        machine.teardown()
