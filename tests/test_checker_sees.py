"""The checker sees: histories by hand, at least three for each way of going wrong, each named by its check (6.3)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from outbox.testing import records as said
from outbox.testing.checker import CHECKS, check
from tests.histories import INDEX, SECOND, Tale, gone, state

Story = Callable[[], Tale]
BAD: list[tuple[str, Story]] = []


def bad(name: str) -> Callable[[Story], Story]:
    """Register a history that a check must find wrong."""

    def register(story: Story) -> Story:
        BAD.append((name, story))
        return story

    return register


def good(*names: str) -> Tale:
    """One event written and delivered for each name."""
    tale = Tale()
    for position, name in enumerate(names or ("p",), 1):
        tale.write(state(position, name)).deliver(state(position, name))
    return tale


@bad("lost")
def committed_and_never_asked_for() -> Tale:
    return good("p").write(state(2, "q")).end(state(1), state(2, "q"), shown={INDEX: (state(1),)})


@bad("lost")
def asked_for_and_never_applied() -> Tale:
    tale = good("p").write(state(2, "q")).ask(state(2, "q"), call="x").answer("x", "raised")
    return tale.end(state(1), state(2, "q"), shown={INDEX: (state(1),)})


@bad("lost")
def on_one_secondary_and_not_on_the_other() -> Tale:
    return Tale(INDEX, "cache").write(state(1)).deliver(state(1)).end(state(1), shown={"cache": ()})


@bad("lost")
def an_unknown_commit_that_the_tables_prove() -> Tale:
    return good("p").write(state(2, "q"), how="unknown").end(state(1), state(2, "q"), shown={INDEX: (state(1),)})


@bad("lost")
def an_older_event_in_log_order() -> Tale:
    tale = Tale().write(state(1)).write(state(2)).deliver(state(2))
    return tale.end(state(1), state(2), ordering="log")


@bad("lost")
def newer_than_what_a_hold_stands_for() -> Tale:
    tale = Tale().write(state(1)).write(state(2))
    tale.say(said.Held(backend_id=INDEX, key=state(1).key, state="dead", positions=[1], oldest=1))
    return tale.end(state(1), state(2), shown={INDEX: ()})


@bad("lost")
def a_position_that_was_committed_and_then_given_to_another() -> Tale:
    tale = good("p").write(state(2, "q"), name="a").write(state(2, "r"), name="b")
    return tale.deliver(state(2, "r")).end(state(1), state(2, "r"))


@bad("phantom")
def delivered_and_rolled_back() -> Tale:
    return good("p").write(state(2, "q"), how="rolled_back").deliver(state(2, "q")).end(state(1))


@bad("phantom")
def delivered_and_its_savepoint_undone() -> Tale:
    tale = good("p").say(said.Undone(transaction="t1", positions=[1]))
    return tale.end(shown={INDEX: (state(1),)})


@bad("phantom")
def delivered_and_unknown_and_not_there() -> Tale:
    return good("p").write(state(2, "q"), how="unknown").deliver(state(2, "q")).end(state(1))


@bad("phantom")
def delivered_and_recorded_by_nobody() -> Tale:
    return good("p").deliver(state(2, "q")).end(state(1))


@bad("phantom")
def kept_and_rolled_back() -> Tale:
    return good("p").write(state(2, "q"), how="rolled_back").end(state(1), state(2, "q"), shown={INDEX: (state(1),)})


@bad("altered")
def another_content() -> Tale:
    return Tale().write(state(1)).deliver(state(1, digest="other")).end(state(1))


@bad("altered")
def another_id() -> Tale:
    return Tale().write(state(1)).deliver(state(1, "q", "d1")).end(state(1))


@bad("altered")
def a_delete_that_arrives_as_a_write_told_of_late() -> Tale:
    return Tale().deliver(state(1)).write(gone(1)).end(gone(1))


@bad("cross-tenant")
def asked_under_another_tenant() -> Tale:
    return Tale().write(state(1)).ask(state(1, tenant="other"), call="x").answer("x").deliver(state(1)).end(state(1))


@bad("cross-tenant")
def applied_under_another_tenant() -> Tale:
    tale = Tale().write(state(1)).ask(state(1), call="x").apply(state(1, tenant="other"), call="x").answer("x")
    return tale.end(state(1))


@bad("cross-tenant")
def shown_to_another_tenant() -> Tale:
    return good().end(state(1), shown={INDEX: (state(1, tenant="other"),)})


@bad("regressed")
def an_older_state_over_a_newer_one() -> Tale:
    return good("p", "p").deliver(state(1), call="again").end(state(1), state(2), shown={INDEX: (state(1),)})


@bad("regressed")
def an_older_delete_over_a_newer_state() -> Tale:
    tale = Tale().write(gone(1)).deliver(gone(1)).write(state(2)).deliver(state(2)).deliver(gone(1), call="again")
    return tale.end(gone(1), state(2), shown={INDEX: ()})


@bad("regressed")
def shown_older_than_it_took() -> Tale:
    return good("p", "p").end(state(1), state(2), shown={INDEX: (state(1),)})


@bad("resurrected")
def written_after_its_delete() -> Tale:
    tale = good().write(gone(2)).deliver(gone(2)).deliver(state(1), call="again")
    return tale.end(state(1), gone(2), shown={INDEX: (state(1),)})


@bad("resurrected")
def written_by_a_late_call() -> Tale:
    tale = good().ask(state(1), call="late").write(gone(2)).deliver(gone(2)).apply(state(1), call="late")
    return tale.answer("late").deliver(gone(2), call="again").end(state(1), gone(2))


@bad("resurrected")
def shown_after_its_delete() -> Tale:
    return good().write(gone(2)).deliver(gone(2)).end(state(1), gone(2), shown={INDEX: (state(1),)})


def two_calls_at_once(tale: Tale) -> Tale:
    """The same key in the hands of two relays, each with a claim of its own."""
    tale.ask(state(1), call="a", caller="r1").ask(state(1), call="b", caller="r2")
    return tale.apply(state(1), call="a").answer("a").answer("b").end(state(1))


@bad("double-leased")
def in_two_calls_at_once() -> Tale:
    return two_calls_at_once(Tale().write(state(1)).claim(1, 1, by="r1").claim(2, 1, by="r2"))


@bad("double-leased")
def in_two_calls_at_once_though_another_relay_was_killed() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").claim(2, 1, by="r2")
    return two_calls_at_once(tale.say(said.Fired(fault="sigkill", against="r3")))


@bad("double-leased")
def in_two_calls_at_once_long_after_a_pause() -> Tale:
    tale = Tale().say(said.Fired(fault="sigstop", against="r1")).say(said.Healed(fault="sigstop", against="r1"))
    return two_calls_at_once(tale.write(state(1)).claim(1, 1, by="r1").claim(2, 1, by="r2"))


@bad("double-leased")
def in_two_calls_at_once_after_faults_that_ended_in_the_order_they_began() -> Tale:
    tale = Tale().say(said.Fired(fault="stop", against="r1")).say(said.Fired(fault="cut", against="r1"))
    tale.say(said.Healed(fault="stop", against="r1")).say(said.Healed(fault="cut", against="r1"))
    return two_calls_at_once(tale.write(state(1)).claim(1, 1, by="r1").claim(2, 1, by="r2"))


@bad("double-leased")
def in_two_calls_at_once_when_a_third_has_ended() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").say(said.Fired(fault="sigkill", against="r1"))
    tale.ask(state(1), call="dead", caller="r1").claim(2, 1, by="r2").ask(state(1), call="a", caller="r2")
    tale.answer("dead").claim(3, 1, by="r3").ask(state(1), call="b", caller="r3")
    return tale.apply(state(1), call="b").answer("b").answer("a").end(state(1))


@bad("double-leased")
def in_two_calls_at_once_of_which_one_loses_its_lease_later() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").claim(2, 1, by="r2", lease=1)
    tale.ask(state(1), call="a", caller="r1").ask(state(1), call="b", caller="r2").apply(state(1), call="a")
    return tale.answer("a").answer("b").settle(2, by="r1", how="lost").settle(1, by="r1").end(state(1))


@bad("double-leased")
def held_by_two_relays() -> Tale:
    return good().claim(1, 1, by="r1").claim(2, 1, by="r2").settle(1, "r1").settle(2, "r2").end(state(1))


@bad("double-leased")
def open_twice_by_the_clock_of_the_primary() -> Tale:
    tale = good().attempted(1, 1, started=10, finished=30, applied=1).attempted(2, 1, started=20, finished=40, stale=1)
    return tale.end(state(1))


@bad("double-leased")
def two_events_of_a_key_in_two_attempts() -> Tale:
    tale = good("p", "p").attempted(1, 1, started=10, finished=30, applied=1)
    return tale.attempted(2, 2, started=29, finished=40, applied=1).end(state(1), state(2))


@bad("double-leased")
def twice_in_one_call() -> Tale:
    return Tale().write(state(1), state(2)).deliver(state(1), state(2)).end(state(1), state(2))


@bad("order")
def asked_for_after_a_newer_one() -> Tale:
    tale = Tale().write(state(1)).write(state(2)).claim(1, 1, 2)
    return tale.deliver(state(2), caller="r1").deliver(state(1), caller="r1").end(state(1), state(2))


@bad("order")
def asked_for_after_a_delete() -> Tale:
    tale = Tale().write(state(1)).write(gone(2)).claim(1, 2, by="r1").settle(1).claim(2, 1, by="r2")
    return tale.deliver(gone(2), caller="r1").deliver(state(1), caller="r2").end(state(1), gone(2))


@bad("order")
def committed_first_with_the_higher_position() -> Tale:
    return Tale().write(state(2)).write(state(1)).deliver(state(2)).end(state(1), state(2))


@bad("order")
def committed_first_with_a_position_far_above() -> Tale:
    tale = Tale().write(state(9)).write(state(3), how="").write(state(5, "q"))
    tale.say(said.Ended(transaction="t3", how="committed"))
    return tale.deliver(state(9)).deliver(state(5, "q")).end(state(3), state(5, "q"), state(9))


@bad("stale-settled")
def settled_twice() -> Tale:
    return good().claim(1, 1).settle(1).settle(1).end(state(1))


@bad("stale-settled")
def settled_by_somebody_else() -> Tale:
    return good().claim(1, 1, by="r1").settle(1, by="r2").end(state(1))


@bad("stale-settled")
def settled_though_closed_as_lost() -> Tale:
    return good().claim(1, 1).settle(1).attempted(1, 1, started=1, finished=2, lost=1).end(state(1))


@bad("stale-settled")
def settled_though_it_ran_out_and_was_claimed_again() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1", lease=1_000_000).claim(2, 1, by="r2", lease=1_000_000)
    return tale.deliver(state(1)).settle(1, "r1").settle(2, "r2").end(state(1))


@bad("stale-settled")
def settled_and_still_open() -> Tale:
    return good().claim(1, 1).settle(1).attempted(1, 1, started=1).end(state(1))


@bad("waited early")
def told_before_it_arrived() -> Tale:
    return Tale().write(state(1)).told(1).deliver(state(1)).end(state(1))


@bad("waited early")
def told_of_two_when_one_was_there() -> Tale:
    return good("p").write(state(2, "q")).told(1, 2).deliver(state(2, "q")).end(state(1), state(2, "q"))


@bad("waited early")
def told_by_an_older_event_of_the_key() -> Tale:
    return good("p").write(state(2)).told(2).deliver(state(2)).end(state(1), state(2))


@bad("waited early")
def told_of_another_secondary() -> Tale:
    tale = Tale(INDEX, "cache").write(state(1)).deliver(state(1)).told(1, done=(INDEX, "cache"))
    return tale.deliver(state(1), on="cache").end(state(1))


@bad("waited early")
def told_of_nothing() -> Tale:
    return good().told().end(state(1))


@bad("waited early")
def told_of_what_was_rolled_back() -> Tale:
    return good().write(state(2, "q"), how="rolled_back").told(2).end(state(1))


@bad("waited early")
def told_of_what_never_was() -> Tale:
    return good().told(77).end(state(1))


@bad("waited early")
def written_earlier_and_stamped_later() -> Tale:
    tale = Tale().write(state(1)).ask(state(1))
    tale.say(said.Applied(at=SECOND, backend_id=INDEX, call="c1", entries=[state(1)])).answer("c1")
    return tale.told(1).end(state(1))


@bad("wrongly pruned")
def gone_before_it_arrived() -> Tale:
    return good().write(state(2, "q")).say(said.Pruned()).end(state(1), shown={INDEX: (state(1),)})


@bad("wrongly pruned")
def gone_while_one_secondary_lacked_it() -> Tale:
    tale = Tale(INDEX, "cache").write(state(1)).deliver(state(1)).say(said.Pruned(positions=[1]))
    return tale.deliver(state(1), on="cache").end()


@bad("wrongly pruned")
def owed_and_gone() -> Tale:
    return good().say(said.Pruned()).say(said.Owed(backend_id=INDEX, positions=[1])).end()


@bad("wrongly pruned")
def held_and_gone() -> Tale:
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="retrying", positions=[1], oldest=1)
    return good().say(said.Pruned()).say(hold).end()


@bad("wrongly pruned")
def gone_though_nothing_was_pruned() -> Tale:
    return good("p", "q").end(state(1))


@bad("counts")
def reported_otherwise_than_recounted() -> Tale:
    return good().say(said.Counted(backend_id=INDEX, reported=3, recounted=4)).end(state(1))


@bad("counts")
def fewer_counted_than_recorded() -> Tale:
    return good("p", "q").end(state(1), state(2, "q"), totals={"applied": 1})


@bad("counts")
def more_counted_than_recorded() -> Tale:
    tale = good().attempted(1, 1, started=1, finished=2, applied=1)
    return tale.end(state(1), totals={"applied": 1})


@bad("counts")
def owed_in_two_places() -> Tale:
    tale = good().say(said.Owed(backend_id=INDEX, positions=[1])).attempted(1, 1, started=1)
    return tale.end(state(1))


@bad("attempts")
def more_attempts_than_allowed() -> Tale:
    tale = good().say(said.Promised(most_attempts=3))
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="dead", positions=[1], oldest=1, attempts=4)
    return tale.say(hold).end(state(1))


@bad("attempts")
def tried_though_none_are_left() -> Tale:
    tale = good().say(said.Promised(most_attempts=3))
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="retrying", positions=[1], oldest=1, attempts=3)
    return tale.say(hold).end(state(1))


@bad("attempts")
def more_attempts_than_claims() -> Tale:
    tale = good().claim(1, 1).settle(1)
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="retrying", positions=[1], oldest=1, attempts=2)
    return tale.say(hold).end(state(1))


@bad("attempts")
def handed_over_again_and_again() -> Tale:
    tale = good().say(said.Promised(most_again=2)).say(said.Fired(fault="sigkill", against="r1"))
    for number in range(3):
        tale.deliver(state(1), call=f"again {number}")
    return tale.end(state(1))


@bad("false drift")
def reported_and_never_damaged() -> Tale:
    return good().say(said.Reconciled(backend_id=INDEX, drift=[state(1).key])).end(state(1))


@bad("false drift")
def reported_before_it_was_damaged() -> Tale:
    tale = good().say(said.Reconciled(backend_id=INDEX, drift=[state(1).key]))
    return tale.say(said.Damaged(backend_id=INDEX, entry=state(1, digest="x"))).end(state(1))


@bad("false drift")
def reported_where_another_was_damaged() -> Tale:
    tale = good("p", "q").say(said.Damaged(backend_id=INDEX, entry=state(1, digest="x")))
    tale.say(said.Reconciled(backend_id=INDEX, drift=[state(1).key, state(2, "q").key]))
    return tale.end(state(1), state(2, "q"))


@bad("equality")
def missing_in_the_end() -> Tale:
    return good().end(state(1), shown={INDEX: ()})


@bad("equality")
def extra_in_the_end() -> Tale:
    return good().end(state(1), shown={INDEX: (state(1), state(5, "q"))})


@bad("equality")
def altered_in_the_end() -> Tale:
    return good().end(state(1), shown={INDEX: (state(1, digest="x"),)})


@bad("equality")
def at_another_position_in_the_end() -> Tale:
    return good("p", "p").end(state(1), state(2), shown={INDEX: (state(7, digest="d2"),)})


@bad("equality")
def the_primary_is_not_as_its_events_say() -> Tale:
    return good().end(state(1), rows=(state(0, digest="x"),))


@bad("equality")
def a_row_that_no_event_tells_of() -> Tale:
    return good().end(state(1), rows=(state(0, digest="d1"), state(0, "q")))


@bad("convergence")
def longer_than_promised() -> Tale:
    tale = Tale().say(said.Promised(converge_within=SECOND)).write(state(1)).say(said.Fired(fault="sigkill"))
    tale.now += 2 * SECOND
    return tale.deliver(state(1)).end(state(1))


@bad("convergence")
def drained_later_than_promised() -> Tale:
    tale = good().say(said.Promised(converge_within=SECOND)).say(said.Healed(fault="outage"))
    tale.now += 2 * SECOND
    return tale.say(said.Drained()).end(state(1))


@bad("convergence")
def still_owed() -> Tale:
    return Tale().write(state(1)).say(said.Owed(backend_id=INDEX, positions=[1])).end(state(1))


@bad("convergence")
def still_held() -> Tale:
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="retrying", positions=[1], oldest=1)
    return Tale().write(state(1)).say(hold).end(state(1))


@bad("vacuity")
def nothing_happened() -> Tale:
    return Tale().end()


@bad("vacuity")
def a_fault_never_fired() -> Tale:
    tale = good().say(said.Promised(faults={"sigkill": 2, "sigstop": 1}))
    return tale.say(said.Fired(fault="sigkill")).say(said.Fired(fault="sigstop")).end(state(1))


@bad("vacuity")
def an_operation_never_succeeded() -> Tale:
    return good().say(said.Promised(operations={"synced": 1, "redrive": 1})).told(1).end(state(1))


@bad("vacuity")
def written_and_never_committed() -> Tale:
    return Tale().write(state(1), how="rolled_back").end()


@pytest.mark.parametrize(("name", "story"), BAD, ids=lambda each: getattr(each, "__name__", each))
def test_it_is_seen_and_shown(name: str, story: Story):
    tale = story()
    report = tale.report()
    assert name in tale.wrong()
    anomalies = report[name].anomalies
    assert anomalies
    if name not in ("vacuity", "attempts"):
        assert all(shown.records for shown in report.shown if shown.anomaly in anomalies)


def test_every_check_has_three_bad_histories():
    names = {check(()).verdicts[number].check for number in range(len(CHECKS))}
    counts = Counter(name for name, _ in BAD)
    assert counts.keys() == names
    assert min(counts.values()) >= 3
