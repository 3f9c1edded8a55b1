"""Promise 8: a secondary being down costs no event its attempts; it is the secondary that is unavailable."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Outcome, Registration, Retry, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.secondaries.opensearch_answer import retry_after_of
from tests.relaying import change, execute, hold_of, manager_of, pending, rows, running, value, write
from tests.scripted import Call, CheckedSecondary, Hang, ScriptedSecondary
from tests.waiting import eventually

REFUSED = Unavailable("refused", "nobody there")
SHARD_LOST = Retry("shard_lost", blameless=True)


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def breaker(primary: AsyncEngine) -> dict[str, Any]:
    (row,) = await rows(
        primary,
        """
        select breaker as state, breaker_failures as failures, breaker_ramp as ramp,
               breaker_until - (select max(started_at) from outbox_attempt) as wait
        from outbox_secondary
        """,
    )
    return row


async def is_open(primary: AsyncEngine) -> bool:
    return (await breaker(primary))["state"] != "closed"


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_an_outage_costs_no_event_any_attempt(primary: AsyncEngine) -> None:
    """F8, B3: refused two dozen times, every event has all its attempts, and all arrive when the secondary is back."""
    secondary, manager = await one(primary, max_attempts=3, breaker_max=0.06)
    secondary.down = REFUSED
    async with running(manager.relay()):
        await write(manager, *(change(str(number)) for number in range(40)))
        await eventually(lambda: len(secondary.calls) >= 24)
        assert await value(primary, "select max(attempts) from outbox_hold") == 0
        status = await manager.backend_status("search")
        assert (status.pending, status.failing, status.dead, status.retried, status.lost) == (40, 0, 0, 0, 0)
        assert status.last_error_code == "refused"
        assert status.breaker != "closed"
        secondary.down = None
        await eventually(lambda: nothing_owed(primary))
    assert len(secondary.held) == 40
    assert await value(primary, "select sum(retried + rejected + lost) from outbox_attempt") == 0


async def test_the_breaker_opens_at_its_threshold_and_then_nothing_is_asked(primary: AsyncEngine) -> None:
    """F8: three batches in a row, whatever their keys are; not one request more until the wait is over."""
    secondary, manager = await one(primary, breaker_threshold=3, breaker_initial=30, breaker_max=30, batch_size=5)
    secondary.down = REFUSED
    await write(manager, *(change(str(number)) for number in range(50)))
    relay = manager.relay()
    for failures in (1, 2):
        await relay.run_once("search")
        assert (await breaker(primary))["failures"] == failures
        assert not await is_open(primary)
    await relay.run_once("search")
    opened = await breaker(primary)
    assert opened["state"] == "open"
    assert timedelta(seconds=15) <= opened["wait"] < timedelta(seconds=32)
    for _ in range(5):
        assert await relay.run_once("search") == 0
    assert len(secondary.calls) == 3


async def test_one_success_forgets_the_failures_before_it(primary: AsyncEngine) -> None:
    """F8: the threshold counts batches in a row."""
    secondary, manager = await one(primary, breaker_threshold=2, batch_size=1)
    relay = manager.relay()
    for number in range(3):
        await write(manager, change(str(number)))
        secondary.down = REFUSED
        await relay.run_once("search")
        assert (await breaker(primary))["failures"] == 1
        assert not await is_open(primary)
        secondary.down = None
        await eventually(relay.drain)
        await eventually(lambda: nothing_owed(primary))


async def test_waits_between_probes_grow_up_to_their_cap(primary: AsyncEngine) -> None:
    """F8: doubled with jitter, by the database's clock."""
    secondary, manager = await one(primary, breaker_threshold=1, breaker_initial=1, breaker_max=6)
    secondary.down = REFUSED
    await write(manager, change("1"))
    relay = manager.relay()
    for longest in (1, 2, 4, 6, 6):
        assert await relay.run_once("search") == 1
        wait = (await breaker(primary))["wait"]
        assert timedelta(seconds=longest / 2) <= wait < timedelta(seconds=longest + 2)
        await execute(primary, "update outbox_secondary set breaker_until = now()")
    assert all(len(call.events) == 1 for call in secondary.calls)


async def test_one_probe_at_a_time_decides_also_with_two_relays(primary: AsyncEngine) -> None:
    """F8: the probe is one event, and takes many leases to fail; nobody else asks meanwhile."""
    # Waits that are longer than it takes to stop all relays, once two probes were seen.
    slow = {"breaker_threshold": 1, "lease": 1.5, "attempt_deadline": 4.5, "breaker_initial": 2, "breaker_max": 4}
    secondary, manager = await one(primary, **slow, batch_size=5)
    others = [manager_of(primary, secondary, **slow) for _ in range(2)]
    secondary.down = REFUSED
    await write(manager, *(change(str(number)) for number in range(20)))
    await manager.relay().run_once("search")
    assert await is_open(primary)
    already = len(secondary.calls)
    secondary.hang()
    async with running(manager.relay(), *(other.relay() for other in others)):
        await eventually(lambda: len(secondary.calls) >= already + 2)
    probes = secondary.calls[already:]
    assert {len(call.events) for call in probes} == {1}
    assert await value(primary, "select sum(lost) from outbox_attempt") == 0, "the machine stood still for a lease"
    assert all(_answered_first(before, after) for before, after in pairwise(probes))


async def test_the_breaker_opens_before_anybody_can_find_the_batch_over(primary: AsyncEngine) -> None:
    """Else the next probe begins between the two, beside whom the one after it finds an open breaker."""
    secondary, manager = await one(primary, breaker_threshold=1, breaker_initial=30, breaker_max=30)
    await execute(primary, "create table seen (breaker text)")
    noted = "insert into seen select breaker from outbox_secondary; return new;"
    await execute(primary, f"create function note() returns trigger language plpgsql as 'begin {noted} end'")
    await execute(
        primary,
        "create trigger note after update of finished_at on outbox_attempt for each row execute function note()",
    )
    secondary.down = REFUSED
    await write(manager, change("1"))
    relay = manager.relay()
    for _ in range(2):
        assert await relay.run_once("search") == 1
        assert await is_open(primary)
        await execute(primary, "update outbox_secondary set breaker_until = now()")
    assert [row["breaker"] for row in await rows(primary, "select breaker from seen")] == ["open", "open"]


def _answered_first(before: Call, after: Call) -> bool:
    return before.finished is not None and before.finished < after.started


async def test_a_probe_whose_relay_vanished_is_followed_by_another(primary: AsyncEngine) -> None:
    """F8, D1: half-open is no trap."""
    secondary, manager = await one(primary)
    await write(manager, change("1"))
    half_open = "breaker = 'half_open', breaker_opens = 1, breaker_until = now() + interval '300 milliseconds'"
    await execute(primary, f"update outbox_secondary set {half_open}")
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert not await is_open(primary)
    assert len(secondary.held) == 1


@pytest.mark.parametrize("threshold", [1, 3])
async def test_retry_after_is_honoured(primary: AsyncEngine, threshold: int) -> None:
    """B4: the secondary asked for a second and a half; it is left alone for as long, whichever event is next."""
    settings = {"breaker_threshold": threshold, "retry_max": 5, "batch_size": 2, "attempts_in_flight": 1}
    secondary, manager = await one(primary, **settings)
    await write(manager, *(change(str(number)) for number in range(6)))
    secondary.script("0", Unavailable("throttled", "", retry_after=timedelta(seconds=1.5)))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    index = [call.ending for call in secondary.calls].index("Unavailable")
    throttled, following = secondary.calls[index : index + 2]
    assert throttled.ended is not None
    assert following.began - throttled.ended > 1.4


async def test_retry_after_is_clamped(primary: AsyncEngine) -> None:
    """B4: who asks for a year gets `retry_max`; who asks for less than nothing gets the usual wait."""
    secondary, manager = await one(primary, breaker_threshold=1, retry_max=20, breaker_initial=1, breaker_max=2)
    await write(manager, change("1"))
    relay = manager.relay()
    for asked, least, most in ((timedelta(days=365), 20, 20), (timedelta(days=-365), 0.5, 2)):
        secondary.down = Unavailable("throttled", "", retry_after=asked)
        assert await relay.run_once("search") == 1
        wait = (await breaker(primary))["wait"]
        assert timedelta(seconds=least) <= wait < timedelta(seconds=most + 2)
        await execute(primary, "update outbox_secondary set breaker_until = now()")


FORMS = {
    "seconds": ("7", 7, 7),
    "a date": ("Thu, 01 Jan 2026 00:00:09 GMT", 9, 9),
    "a date in the past": ("Wed, 31 Dec 2025 00:00:00 GMT", 0.5, 1),
    "a date too far": ("Fri, 31 Dec 9999 23:59:59 GMT", 20, 20),
    "zero": ("0", 0.5, 1),
    "huge": ("9" * 400, 20, 20),
    "negative": ("-5", 0.5, 1),
    "a fraction": ("7.5", 0.5, 1),
    "garbage": ("soon\x00", 0.5, 1),
}


@pytest.mark.parametrize("form", FORMS)
async def test_a_retry_after_in_any_form_is_a_wait_of_the_whole_secondary(primary: AsyncEngine, form: str) -> None:
    """B4: read or ignored, clamped to `retry_max`; nothing else is sent meanwhile, and no event pays for it."""
    header, least, most = FORMS[form]
    secondary, manager = await one(primary, breaker_threshold=1, retry_max=20, breaker_initial=1, breaker_max=1)
    asked = retry_after_of({"Retry-After": header, "Date": "Thu, 01 Jan 2026 00:00:00 GMT"})
    secondary.down = Unavailable("throttled", "", retry_after=asked)
    await write(manager, change("1"))
    assert await manager.relay().run_once("search") == 1
    wait = (await breaker(primary))["wait"]
    assert timedelta(seconds=least) <= wait < timedelta(seconds=most + 2)
    await write(manager, change("2"), change("3", tenant="other"))
    assert await manager.relay().run_once("search") == 0
    assert len(secondary.calls) == 1
    assert await value(primary, "select max(attempts) from outbox_hold") == 0


async def test_a_storm_of_refusals_opens_the_breaker_once(primary: AsyncEngine) -> None:
    """B4: eight batches are out when the secondary throttles; they wait together for as long as it asked."""
    secondary, manager = await one(primary, retry_max=60, batch_size=2, attempts_in_flight=8, lease=30)
    secondary.hang()
    await write(manager, *(change(str(number)) for number in range(40)))
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.running) == 8)
        secondary.down = Unavailable("throttled", "", retry_after=timedelta(seconds=30))
        secondary.release()
        await eventually(
            lambda: value(primary, "select count(*) = 8 from outbox_attempt where finished_at is not null")
        )
    assert len(secondary.calls) == 8
    (row,) = await rows(primary, "select breaker, breaker_opens from outbox_secondary")
    assert row == {"breaker": "open", "breaker_opens": 1}
    assert timedelta(seconds=30) <= (await breaker(primary))["wait"] <= timedelta(seconds=45)


async def test_no_number_of_failed_probes_overflows_the_wait(primary: AsyncEngine) -> None:
    """B5: a secondary that was away for years is asked as often as one that was away for an hour."""
    secondary, manager = await one(primary, breaker_initial=1, breaker_max=6)
    secondary.down = REFUSED
    await write(manager, change("1"))
    for opens in (31, 10**6, 2**31 - 2):
        many = "breaker = 'half_open', breaker_until = now()"
        await execute(primary, f"update outbox_secondary set {many}, breaker_opens = :opens", opens=opens)
        await execute(primary, "update outbox_secondary set breaker_failures = :opens", opens=opens)
        assert await manager.relay().run_once("search") == 1
        assert timedelta(seconds=3) <= (await breaker(primary))["wait"] < timedelta(seconds=8)


async def test_recovery_ramps_up(primary: AsyncEngine) -> None:
    """F8: after the probe the batches grow 2, 4, 8, ... and then are full again; one at a time until then."""
    secondary, manager = await one(primary, breaker_threshold=1, batch_size=20)
    secondary.down = REFUSED
    await write(manager, *(change(str(number)) for number in range(100)))
    await manager.relay().run_once("search")
    secondary.down = None
    await execute(primary, "update outbox_secondary set breaker_until = now()")
    relay = manager.relay()
    sizes: list[int] = []
    while sum(sizes) < 100:
        sizes.append(await eventually(lambda: relay.run_once("search")))
    assert sizes[:5] == [1, 2, 4, 8, 16]
    assert max(sizes) == 20
    assert (await breaker(primary))["ramp"] is None


async def test_the_breaker_survives_a_restart(primary: AsyncEngine) -> None:
    """F8: another relay, another process: what was learnt is in the database."""
    secondary, manager = await one(primary, breaker_threshold=1, breaker_initial=30, breaker_max=30)
    secondary.down = REFUSED
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    again = manager_of(primary, secondary, breaker_threshold=1, breaker_initial=30, breaker_max=30)
    await write(again, change("2"))
    for _ in range(3):
        assert await again.relay().run_once("search") == 0
    assert len(secondary.calls) == 1
    assert await is_open(primary)


async def test_a_timeout_while_the_secondary_answers_blames_the_event(primary: AsyncEngine) -> None:
    """Design, retry: what hangs though the secondary is there spends an attempt and opens no breaker."""
    secondary = CheckedSecondary("search")
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45, retry_initial=30, retry_max=30)
    await manager.register()
    secondary.always("1", Hang())
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["state"], hold["attempts"], hold["error_code"], hold["alone"]) == ("retrying", 1, "timeout", True)
    assert secondary.checks == 1
    assert (await breaker(primary))["failures"] == 0


@pytest.mark.parametrize("asked", [True, False])
async def test_a_timeout_of_a_secondary_that_does_not_answer_blames_nobody(primary: AsyncEngine, asked: bool) -> None:
    """F8: the check fails too, or there is none to ask."""
    secondary = CheckedSecondary("search") if asked else ScriptedSecondary("search")
    if isinstance(secondary, CheckedSecondary):
        secondary.unreachable = REFUSED
    manager = manager_of(primary, secondary, lease=1.2, attempt_deadline=0.45)
    await manager.register()
    secondary.hang()
    await write(manager, change("1"), change("2"))
    await manager.relay().run_once("search")
    assert [row["attempts"] for row in await rows(primary, "select attempts from outbox_hold")] == [0, 0]
    assert (await breaker(primary))["failures"] == 1


class HalfWay(ScriptedSecondary):
    """Goes away in the middle of every batch, having kept the first half of it, and says so."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        known = await super().apply(list(batch)[: (len(batch) + 1) // 2])
        raise Unavailable("refused", "gone half-way", known=known)


async def test_going_away_half_way_costs_the_rest_no_attempt_either(primary: AsyncEngine) -> None:
    """B3: what the secondary had done by then is done; the rest is released with all its attempts."""
    secondary = HalfWay("search")
    manager = manager_of(primary, secondary, max_attempts=2, breaker_threshold=1000)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(9)))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert await value(primary, "select sum(retried + rejected + lost) from outbox_attempt") == 0
    assert len(secondary.sent) == 9, "what was known to be done was sent again"


async def test_what_a_part_of_the_secondary_refuses_spends_no_attempt(primary: AsyncEngine) -> None:
    """Its documents wait, visibly, for as long as it takes, and keep nothing else; then they arrive."""
    secondary, manager = await one(primary, max_attempts=1)
    secondary.always("1", SHARD_LOST)
    async with running(manager.relay()):
        await write(manager, *(change(str(number)) for number in range(5)))
        await eventually(lambda: len(secondary.calls_with("1")) >= 6)
        status = await manager.backend_status("search")
        assert (status.pending, status.failing, status.dead, status.retried, status.lost) == (1, 1, 0, 0, 0)
        assert status.breaker == "closed"
        hold = await hold_of(primary, "1")
        assert hold is not None
        assert (hold["state"], hold["attempts"], hold["error_code"]) == ("retrying", 0, "shard_lost")
        secondary.heal("1")
        await eventually(lambda: nothing_owed(primary))
    assert len(secondary.held) == 5


async def test_refusals_and_nothing_else_are_an_outage(primary: AsyncEngine) -> None:
    """No part of it works: the breaker opens, for as long as it asked."""
    secondary, manager = await one(primary, breaker_threshold=3, retry_max=60)
    for name in ("1", "2", "3"):
        secondary.always(name, Retry("throttled", after=timedelta(seconds=20), blameless=True))
    await write(manager, *(change(name) for name in ("1", "2", "3")))
    assert await manager.relay().run_once("search") == 3
    opened = await breaker(primary)
    assert opened["state"] == "open"
    assert timedelta(seconds=20) <= opened["wait"] <= timedelta(seconds=22)
    assert await value(primary, "select max(attempts) from outbox_hold") == 0


async def test_one_that_is_taken_says_that_it_is_no_outage(primary: AsyncEngine) -> None:
    secondary, manager = await one(primary, breaker_threshold=1)
    secondary.always("1", SHARD_LOST)
    await write(manager, change("1"), change("2"))
    assert await manager.relay().run_once("search") == 2
    assert not await is_open(primary)


async def test_what_was_refused_before_stops_nobody_else(primary: AsyncEngine) -> None:
    """A lost part for days, and all that is due is its own: the secondary answers, and what is new gets through."""
    secondary, manager = await one(primary, breaker_threshold=1, breaker_initial=30, breaker_max=30)
    secondary.always("1", SHARD_LOST)
    await write(manager, change("1"))
    relay = manager.relay()
    assert await relay.run_once("search") == 1
    assert await is_open(primary)
    await execute(primary, "update outbox_secondary set breaker_until = now()")
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert await relay.run_once("search") == 1, "the probe"
    assert secondary.sent_to("1") == [1, 1]
    assert not await is_open(primary)
    await write(manager, change("2"))
    await eventually(lambda: relay.run_once("search"))
    await eventually(lambda: bool(secondary.calls_with("2")))
    assert not await is_open(primary)


async def test_in_log_order_a_refused_event_keeps_the_later_ones_of_its_key(primary: AsyncEngine) -> None:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering="log"), max_attempts=1)
    await manager.register()
    secondary.script("1", SHARD_LOST, SHARD_LOST, SHARD_LOST)
    await write(manager, change("1", 1), change("1", 2), change("2"))
    async with running(manager.relay()):
        await eventually(lambda: nothing_owed(primary))
    assert secondary.sent_to("1") == [1, 1, 1, 1, 2]


async def test_a_refusal_makes_the_waits_longer_and_a_failure_after_it_is_its_first(primary: AsyncEngine) -> None:
    """Nothing is counted: the time since the first refusal says how long to wait, and says nothing of the event."""
    secondary, manager = await one(primary, max_attempts=2, retry_initial=5, retry_max=3_600)
    secondary.script("1", SHARD_LOST, SHARD_LOST, SHARD_LOST, Retry("busy"))
    await write(manager, change("1"))
    relay = manager.relay()
    earlier = "next_attempt_at = now(), first_failed_at = now() - interval '10 minutes'"
    waits = []
    for _ in range(4):
        assert await eventually(lambda: relay.run_once("search")) == 1
        hold = await hold_of(primary, "1")
        assert hold is not None
        waits.append((hold["next_attempt_at"] - hold["last_failed_at"]).total_seconds())
        if len(waits) == 1:
            await execute(primary, f"update outbox_hold set {earlier}")
        else:
            await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert waits[0] <= 5
    assert 300 <= waits[1] <= 602
    assert 300 <= waits[2] <= 604, "the second refusal is no first one"
    assert waits[3] <= 5
    assert (hold["state"], hold["attempts"], hold["error_code"]) == ("retrying", 1, "busy")
    assert hold["first_failed_at"] == hold["last_failed_at"]
