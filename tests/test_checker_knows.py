"""The checker knows what only looks bad: nothing is wrong with these histories, and what they leave open is unknown."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from outbox.testing import records as said
from outbox.testing.checks.verdict import Answer
from tests.histories import INDEX, SECOND, Tale, gone, state

Story = Callable[[], Tale]
GOOD: list[Story] = []


def fine(story: Story) -> Story:
    """Register a history with which nothing is wrong."""
    GOOD.append(story)
    return story


def good(*names: str) -> Tale:
    """One event written and delivered for each name."""
    tale = Tale()
    for position, name in enumerate(names or ("p",), 1):
        tale.write(state(position, name)).deliver(state(position, name))
    return tale


@fine
def a_life_with_a_delete_in_it() -> Tale:
    tale = good("p").write(gone(2)).deliver(gone(2)).write(state(3)).deliver(state(3)).told(1, 2, 3)
    return tale.end(state(1), gone(2), state(3))


@fine
def an_unknown_commit_that_is_seen_later() -> Tale:
    return good("p").write(state(2), how="unknown").deliver(state(2)).end(state(1), state(2))


@fine
def an_unknown_commit_that_never_was() -> Tale:
    return good("p").write(state(2), how="unknown").end(state(1))


@fine
def an_unknown_commit_that_arrived_and_was_pruned() -> Tale:
    tale = Tale().write(state(1), how="committed").deliver(state(1)).write(state(2), how="unknown").deliver(state(2))
    return tale.say(said.Pruned()).end(rows=(state(0, digest="d2"),), shown={INDEX: (state(2),)})


@fine
def a_writer_killed_before_its_commit() -> Tale:
    return good("p").write(state(2, "q"), how="").end(state(1))


@fine
def a_position_that_a_crash_forgot_and_gave_again() -> Tale:
    return (
        good("p")
        .write(state(2, "q"), how="unknown", name="a")
        .write(state(2, "r"), name="b")
        .deliver(state(2, "r"))
        .end(state(1), state(2, "r"))
    )


@fine
def a_position_that_a_savepoint_drew_before_a_crash_forgot_it() -> Tale:
    tale = good("p").say(said.Began(transaction="a")).say(said.Recorded(transaction="a", entries=[gone(2, "q")]))
    tale.say(said.Undone(transaction="a", positions=[2])).say(said.Ended(transaction="a", how="rolled_back"))
    return tale.write(state(2, "r"), name="b").deliver(state(2, "r")).end(state(1), state(2, "r"))


@fine
def a_writer_that_tells_late() -> Tale:
    return Tale().deliver(state(1)).write(state(1)).end(state(1))


@fine
def a_savepoint_undone() -> Tale:
    tale = Tale().say(said.Began(transaction="t"))
    tale.say(said.Recorded(transaction="t", entries=[state(1), state(2, "q")]))
    tale.say(said.Undone(transaction="t", positions=[2])).say(said.Ended(transaction="t", how="committed"))
    return tale.deliver(state(1)).end(state(1))


@fine
def a_stale_write_refused() -> Tale:
    tale = good("p", "p").ask(state(1), call="late")
    return tale.say(said.Refused(backend_id=INDEX, call="late", positions=[1])).answer("late").end(state(1), state(2))


@fine
def handed_over_again_after_a_lost_answer() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1).ask(state(1), call="a", caller="r1").apply(state(1), call="a")
    tale.answer("a", "cut").settle(1, how="retried").claim(2, 1).ask(state(1), call="b", caller="r1")
    tale.say(said.Refused(backend_id=INDEX, call="b", positions=[1])).answer("b").settle(2)
    return tale.told(1).end(state(1))


@fine
def superseded_and_never_sent() -> Tale:
    return Tale().write(state(1)).write(state(2)).deliver(state(2)).told(1).end(state(1), state(2))


@fine
def a_killed_relay_whose_call_goes_on() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").ask(state(1), call="a", caller="r1")
    tale.say(said.Fired(fault="sigkill", against="r1")).claim(2, 1, by="r2").ask(state(1), call="b", caller="r2")
    tale.apply(state(1), call="b").answer("b").settle(2, by="r2")
    return tale.say(said.Refused(backend_id=INDEX, call="a", positions=[1])).answer("a", "abandoned").end(state(1))


@fine
def a_killed_relay_whose_call_is_answered_all_the_same() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").ask(state(1), call="a", caller="r1")
    tale.say(said.Fired(fault="sigkill", against="r1")).claim(2, 1, by="r2").ask(state(1), call="b", caller="r2")
    return tale.apply(state(1), call="b").answer("b").answer("a").end(state(1))


@fine
def a_call_whose_caller_had_gone() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").ask(state(1), call="a", caller="r1").claim(2, 1, by="r2")
    return tale.deliver(state(1), call="b", caller="r2").answer("a", "abandoned").end(state(1))


@fine
def a_call_of_an_attempt_that_the_tables_call_lost() -> Tale:
    tale = Tale().write(state(1)).ask(state(1), call="a", caller="r1").claim(2, 1, by="r2")
    tale.deliver(state(1), call="b", caller="r2").answer("a")
    return tale.attempted(1, 1, started=10, finished=20, by="r1", lost=1).end(state(1))


@fine
def the_same_state_twice() -> Tale:
    return good().told(1).deliver(state(1), call="again").end(state(1))


@fine
def an_older_state_where_the_newer_one_was_destroyed() -> Tale:
    tale = good("p", "p").say(said.Damaged(backend_id=INDEX, entry=state(0)))
    repair = state(3, digest="d2")
    return tale.deliver(state(1), call="late").deliver(repair).end(state(1), state(2), repair)


@fine
def a_paused_relay_that_writes_an_older_event_late() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1").say(said.Fired(fault="sigstop", against="r1")).write(state(2))
    tale.claim(2, 1, 2, by="r2").deliver(state(2), caller="r2").settle(2, by="r2")
    tale.say(said.Healed(fault="sigstop", against="r1")).ask(state(1), call="late", caller="r1")
    tale.say(said.Refused(backend_id=INDEX, call="late", positions=[1])).answer("late")
    tale.settle(1, by="r1", counted=False)
    return tale.end(state(1), state(2))


@fine
def a_paused_relay_whose_call_comes_while_the_next_holder_has_one() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1", lease=1).settle(1, by="r2", how="lost").claim(2, 1, by="r2")
    tale.ask(state(1), call="now", caller="r2").apply(state(1), call="now").ask(state(1), call="late", caller="r1")
    tale.say(said.Refused(backend_id=INDEX, call="late", positions=[1])).answer("late").answer("now")
    return tale.settle(2, by="r2").end(state(1))


@fine
def a_slow_call_whose_deadline_passed() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1).ask(state(1), call="slow", caller="r1").settle(1, how="retried")
    tale.claim(2, 1, by="r2").deliver(state(1), call="b", caller="r2").settle(2, by="r2")
    return tale.answer("slow").end(state(1))


@fine
def a_slow_call_of_which_only_the_tables_know() -> Tale:
    tale = Tale().write(state(1)).ask(state(1), call="slow", caller="r1").deliver(state(1), call="b", caller="r2")
    tale.answer("slow").attempted(1, 1, started=10, finished=20, by="r1", retried=1)
    return tale.attempted(2, 1, started=20, finished=30, by="r2", applied=1).end(state(1))


@fine
def a_batch_taken_apart_in_one_attempt() -> Tale:
    tale = Tale().write(state(1), state(2, "q")).claim(1, 1, 2).ask(state(1), state(2, "q"), call="all", attempt=1)
    tale.ask(state(1), call="one", attempt=1).apply(state(1), call="one").answer("one").answer("all", "raised")
    return tale.deliver(state(2, "q"), attempt=1).settle(1).end(state(1), state(2, "q"))


@fine
def a_settle_that_came_too_late_and_was_refused() -> Tale:
    tale = Tale().write(state(1)).claim(1, 1, by="r1", lease=1).settle(1, by="r2", how="lost").claim(2, 1, by="r2")
    return tale.deliver(state(1)).settle(1, by="r1", counted=False).settle(2, by="r2").end(state(1))


@fine
def a_settle_told_of_late() -> Tale:
    tale = good("p", "p").claim(1, 1, by="r1")
    asked = tale.now + 1
    tale.claim(2, 2, by="r2").settle(1, by="r1", asked=asked).settle(2, by="r2")
    return tale.end(state(1), state(2))


@fine
def one_attempt_opened_as_the_other_closed() -> Tale:
    tale = good("p", "p").attempted(1, 1, started=10, finished=20, applied=1)
    return tale.attempted(2, 2, started=20, finished=30, applied=1).end(state(1), state(2))


@fine
def a_clock_that_was_set_back() -> Tale:
    tale = good("p", "p").say(said.Fired(fault="clock back")).attempted(1, 1, started=90, finished=99, applied=1)
    return tale.attempted(2, 2, started=10, finished=95, applied=1).end(state(1), state(2))


@fine
def positions_the_other_way_round_in_concurrent_commits() -> Tale:
    tale = Tale().say(said.Began(transaction="t1")).write(state(2))
    tale.say(said.Recorded(transaction="t1", entries=[state(1)])).say(said.Ended(transaction="t1", how="committed"))
    return tale.deliver(state(2)).end(state(1), state(2))


@fine
def damaged_found_and_repaired() -> Tale:
    tale = good().say(said.Damaged(backend_id=INDEX, entry=state(0, digest="x")))
    tale.say(said.Reconciled(backend_id=INDEX, drift=[state(1).key], repaired=1))
    repair = state(2, digest="d1")
    return tale.deliver(repair).end(state(1), repair)


@fine
def repaired_and_pruned() -> Tale:
    repair = state(2, digest="d1")
    tale = good().say(said.Damaged(backend_id=INDEX, entry=state(0, digest="x"))).deliver(repair)
    return tale.say(said.Pruned()).end(rows=(state(0, digest="d1"),), shown={INDEX: (repair,)})


@fine
def pruned_when_everybody_had_it() -> Tale:
    tale = good("p", "p").say(said.Pruned(positions=[1]))
    return tale.end(state(2))


@fine
def given_up_by_an_operator() -> Tale:
    tale = good("p").write(state(2)).say(said.GivenUp(backend_id=INDEX, key=state(1).key, oldest=2, position=2))
    return tale.end(state(1), state(2), shown={INDEX: (state(1),)})


@fine
def dead_and_visible() -> Tale:
    hold = said.Held(backend_id=INDEX, key=state(1).key, state="dead", positions=[2], oldest=2, attempts=1)
    return good("p").write(state(2)).say(hold).end(state(1), state(2), shown={INDEX: (state(1),)})


@fine
def a_secondary_that_was_removed() -> Tale:
    tale = good().say(said.Registered(backend_id="gone", status="removed"))
    return tale.say(said.Opened(pid=1, backend_id="gone")).end(state(1))


@fine
def owed_to_one_secondary_only() -> Tale:
    tale = Tale(INDEX, "cache").write(state(1), to=(INDEX,)).deliver(state(1))
    return tale.end(state(1), shown={"cache": ()})


@fine
def counts_with_an_unknown_commit_either_way() -> Tale:
    tale = good().write(state(2, "q"), how="unknown").deliver(state(2, "q")).say(said.Pruned())
    hands = {"rows": (state(0, digest="d1"), state(0, "q", "d2")), "shown": {INDEX: (state(1), state(2, "q"))}}
    tale.attempted(6, 1, started=0, finished=1, applied=1)
    return tale.attempted(7, 2, started=1, finished=2, applied=1).end(totals={"applied": 1}, folded_through=6, **hands)


@fine
def converged_within_what_was_promised() -> Tale:
    tale = Tale().say(said.Promised(converge_within=SECOND)).write(state(1)).say(said.Fired(fault="sigkill"))
    return tale.deliver(state(1)).say(said.Drained()).end(state(1))


@fine
def everything_that_was_promised() -> Tale:
    tale = good().say(said.Promised(faults={"sigkill": 1}, operations={"synced": 1, "redrive": 1}))
    return tale.say(said.Fired(fault="sigkill")).say(said.Did(operation="redrive")).told(1).end(state(1))


@pytest.mark.parametrize("story", GOOD, ids=lambda each: each.__name__)
def test_nothing_is_wrong(story: Story):
    report = story().report()
    assert [line for line in report.lines() if "invalid" in line] == []
    assert report.answer is not Answer.INVALID
    assert report["vacuity"].answer is Answer.VALID


UNKNOWN: dict[str, Callable[[], Tale]] = {
    "lost": lambda: Tale().write(state(1)).write(state(2, "q")).deliver(state(1)),
    "wrongly pruned": good,
    "equality": good,
    "convergence": good,
    "phantom": lambda: good().deliver(state(2, "q")).say(said.Pruned()).end(state(1)),
    "double-leased": lambda: Tale().write(state(1)).ask(state(1), call="a").ask(state(1), call="b").end(state(1)),
    "order": lambda: good("p").write(state(2)).write(state(3)).deliver(state(3)).deliver(state(2)),
    "waited early": lambda: good().told(1, done=("elsewhere",)).end(state(1)),
    "stale-settled": lambda: good().end(state(1)),
    "false drift": lambda: good().end(state(1)),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_a_history_does_not_say_is_unknown(name: str):
    assert UNKNOWN[name]().answers()[name] is Answer.UNKNOWN


def test_a_whole_run_is_valid():
    tale = Tale().say(said.Promised(most_attempts=3)).write(state(1)).claim(1, 1).deliver(state(1), caller="r1")
    tale.settle(1).told(1).say(said.Reconciled(backend_id=INDEX)).say(said.Drained())
    tale.attempted(1, 1, started=10, finished=20, by="r1", applied=1).end(state(1), totals={"applied": 0})
    assert set(tale.answers().values()) == {Answer.VALID}
    assert tale.report().answer is Answer.VALID
