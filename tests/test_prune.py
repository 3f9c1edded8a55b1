"""Retention: never an event that any secondary still lacks; totals outlive what they count (G1, G5)."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncEvent, SyncManager
from outbox.errors import Unavailable
from outbox.prune import fold, prune_attempts, prune_events
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import change, claim_by_hand, execute, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary, Step
from tests.waiting import eventually

AT_ONCE = timedelta(microseconds=1)
TOTALS = "select applied, stale, superseded, retried, rejected, lost from outbox_lag order by backend_id"
OWED_AND_GONE = """
select count(*) from (
    select event_id from outbox_delivery
    union all select unnest(event_ids) from outbox_attempt where finished_at is null
    union all select unnest(event_ids) from outbox_hold
) as owed where not exists (select from outbox as event where event.event_id = owed.event_id)
"""


async def prune(primary: AsyncEngine, keep: timedelta = AT_ONCE) -> int:
    """Prune everything there is to prune; return in how many pages."""
    pages, after = 0, 0
    async with raw(primary) as connection:
        more = True
        while more:
            walked = await prune_events(connection, "public", keep, after)
            assert walked.through > after or not walked.more
            pages, after, more = pages + 1, walked.through, walked.more
    return pages


async def kept(primary: AsyncEngine) -> list[str]:
    return sorted(row["resource_id"] for row in await rows(primary, "select resource_id from outbox"))


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def test_only_what_every_secondary_has_is_pruned(primary: AsyncEngine) -> None:
    """G1: one secondary has all, the other lacks each in another way: waiting, in hand, retrying, dead, released."""
    done, lacking = ScriptedSecondary("done"), ScriptedSecondary("lacking")
    manager = manager_of(primary, done, lacking, retry_initial=600, retry_max=600, batch_size=100)
    await manager.register()
    steps: dict[str, Step | None] = {"retrying": Retry("no"), "dead": Rejected("no"), "has": None}
    for name, step in steps.items():
        lacking.script(name, step)
        await write(manager, change(name))
    await manager.relay().drain()
    lacking.down = Unavailable("refused", "")
    await write(manager, change("released"))
    await manager.relay().run_once("lacking")
    await execute(
        primary, "update outbox_hold set next_attempt_at = now() + interval '1 hour' where state = 'released'"
    )
    await write(manager, change("in hand"))
    assert await claim_by_hand(primary, "lacking", lease=timedelta(minutes=5))
    await write(manager, change("waiting"))
    await manager.relay().run_once("done")

    await prune(primary)
    assert await kept(primary) == sorted(["retrying", "dead", "released", "in hand", "waiting"])
    assert await value(primary, OWED_AND_GONE) == 0


async def test_a_held_tail_is_not_pruned(primary: AsyncEngine) -> None:
    """G1, log order: what waits behind a failure is owed too."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(primary, Registration(secondary, ordering="log"), retry_initial=600, retry_max=600)
    await manager.register()
    secondary.always("1", Retry("no"))
    await write(manager, change("1"))
    await manager.relay().drain()
    await write(manager, *(change("1", number) for number in range(4)))
    async with running(manager.relay()):
        await eventually(lambda: _is(primary, "select max(cardinality(event_ids)) from outbox_hold", 5))
    await prune(primary)
    assert len(await kept(primary)) == 5


async def _is(primary: AsyncEngine, query: str, expected: int) -> bool:
    return await value(primary, query) == expected


async def test_what_is_younger_than_the_setting_stays(primary: AsyncEngine) -> None:
    """By the database's clock."""
    _, manager = await one(primary)
    await write(manager, change("old"), change("young"))
    await manager.relay().drain()
    await execute(primary, "update outbox set created_at = now() - interval '61 minutes' where resource_id = 'old'")
    await execute(primary, "update outbox set created_at = now() - interval '59 minutes' where resource_id = 'young'")
    await prune(primary, timedelta(hours=1))
    assert await kept(primary) == ["young"]


async def test_pruning_goes_in_pages_past_what_must_stay(primary: AsyncEngine) -> None:
    """G5, L10: more than a page of events that are still owed hide none of those behind them."""
    secondary, manager = await one(primary, batch_size=5000)
    await write(manager, *(change(f"owed-{number}") for number in range(1_100)))
    assert await claim_by_hand(primary, "search", batch_size=5000, lease=timedelta(minutes=5))
    await write(manager, *(change(f"done-{number}") for number in range(1_100)))
    await manager.relay().drain()
    assert await prune(primary) == 3
    assert len(await kept(primary)) == 1_100
    assert len(secondary.held) == 1_100


async def test_a_running_relay_prunes_by_itself_and_the_totals_stay(primary: AsyncEngine) -> None:
    """Promise 2, N1: counts of attempts that are gone live on in the registry, and go on growing."""
    secondary = ScriptedSecondary("search")
    tiny = {"keep_events": 0.001, "keep_attempts": 0.001, "prune_interval": 0.02}
    manager = manager_of(primary, secondary, **tiny, batch_size=3)
    await manager.register()
    secondary.script("2", Retry("no"), None)
    secondary.script("3", Rejected("no"))
    async with running(manager.relay()):
        for round_ in range(2):
            await write(manager, *(change(str(number), round_) for number in range(10)), change("9", 99))
            await eventually(lambda: _is(primary, "select count(*) from outbox_delivery", 0))
        await eventually(lambda: _is(primary, "select count(*) from outbox", 0))
        await eventually(lambda: _is(primary, "select count(*) from outbox_attempt", 0))
    (totals,) = await rows(primary, TOTALS)
    # Eleven twice; the dead one was superseded by the second round's.
    assert totals["applied"] + totals["superseded"] == 22
    assert (totals["retried"], totals["rejected"], totals["lost"]) == (1, 1, 0)
    status = await manager.backend_status("search")
    assert status.last_success_at is not None
    assert status.last_error_code == "no"


async def test_folds_at_once_count_once(primary: AsyncEngine) -> None:
    """G2: eight of them, again and again while attempts come to an end."""
    secondary, manager = await one(primary, batch_size=3, prune_interval=3600)
    relay = manager.relay()
    for _ in range(10):
        await write(manager, *(change(str(number)) for number in range(9)))
        await asyncio.gather(relay.drain(), *(_fold(primary) for _ in range(8)))
    await _fold(primary)
    (registry,) = await rows(primary, "select applied, superseded, folded_through from outbox_secondary")
    attempts = await rows(primary, "select sum(applied) as applied, max(attempt_id) as last from outbox_attempt")
    assert registry["applied"] == attempts[0]["applied"] == 90
    assert registry["folded_through"] == attempts[0]["last"]
    assert (await rows(primary, TOTALS))[0]["applied"] == 90
    assert len(secondary.held) == 9


async def _fold(primary: AsyncEngine) -> None:
    async with raw(primary) as connection:
        for _ in range(5):
            await fold(connection, "public", "search")


async def test_a_fold_stops_below_the_oldest_open_attempt(primary: AsyncEngine) -> None:
    """What is still open is neither counted nor passed; it is once it is closed."""
    _, manager = await one(primary)
    await write(manager, change("before"))
    await manager.relay().drain()
    await write(manager, change("open"))
    open_attempt = await claim_by_hand(primary, "search", lease=timedelta(minutes=5))
    assert open_attempt is not None
    await write(manager, change("after"))
    await manager.relay().drain()
    await _fold(primary)
    (registry,) = await rows(primary, "select applied, folded_through from outbox_secondary")
    assert registry["applied"] == 1
    assert registry["folded_through"] == open_attempt.attempt_id - 1
    assert (await rows(primary, TOTALS))[0]["applied"] == 2


async def test_attempts_are_pruned_only_when_folded_closed_and_old(primary: AsyncEngine) -> None:
    """Each of the three keeps one."""
    _, manager = await one(primary)
    for name in ("old", "young", "unfolded"):
        if name == "unfolded":
            await _fold(primary)
        await write(manager, change(name))
        await manager.relay().drain()
    await write(manager, change("open"))
    assert await claim_by_hand(primary, "search", lease=timedelta(minutes=5))
    listed = "select attempt_id from outbox_attempt order by 1"
    ids = [row["attempt_id"] for row in await rows(primary, listed)]
    aged = "update outbox_attempt set finished_at = now() - interval '8 days' where attempt_id = any(:ids)"
    await execute(primary, aged, ids=[ids[0], ids[2]])
    async with raw(primary) as connection:
        await prune_attempts(connection, "public", timedelta(days=7), {})
    assert [
        row["attempt_id"] for row in await rows(primary, "select attempt_id from outbox_attempt order by 1")
    ] == ids[1:]


class Moody(ScriptedSecondary):
    def step_for(self, event: SyncEvent) -> Step | None:
        return random.choice([Retry("no"), Unavailable("no", ""), RuntimeError()]) if random.random() < 0.1 else None


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_pruning_under_load_never_takes_what_is_owed(primary: AsyncEngine, ordering: Any) -> None:
    """G1: two relays prune at once what is a millisecond old, while events fail, wait and move."""
    secondary = Moody("search", pace=lambda: random.random() / 100)
    tiny = {"keep_events": 0.001, "keep_attempts": 0.001, "prune_interval": 0.01, "max_attempts": 1000}
    terms = Registration(secondary, ordering=ordering)
    managers = [manager_of(primary, terms, batch_size=6, **tiny) for _ in range(2)]
    await managers[0].register()
    positions: dict[str, int] = {}
    async with running(*(manager.relay() for manager in managers)):
        for number in range(80):
            await write(managers[0], *(change(str(random.randrange(15)), number) for _ in range(4)))
            assert await value(primary, OWED_AND_GONE) == 0
            for row in await rows(primary, "select resource_id, max(event_id) as position from outbox group by 1"):
                positions[row["resource_id"]] = row["position"]
        await eventually(lambda: _nothing_owed(primary), timedelta(seconds=40))
        await eventually(lambda: _is(primary, "select count(*) from outbox", 0))
    held = {event.resource_id: event.position or 0 for event in secondary.held.values()}
    assert held.keys() == positions.keys()
    assert all(held[name] >= position for name, position in positions.items())
    (totals,) = await rows(primary, TOTALS)
    assert totals["applied"] + totals["stale"] + totals["superseded"] == 320


async def _nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_writers_and_claims_do_not_wait_for_a_page_that_is_being_pruned(primary: AsyncEngine) -> None:
    """G3, G5: no lock but those of the rows that go; there are no partitions to be dropped."""
    secondary, manager = await one(primary)
    await write(manager, *(change(str(number)) for number in range(20)))
    await manager.relay().drain()
    async with raw(primary) as connection, connection.transaction():
        assert (await prune_events(connection, "public", AT_ONCE, 0)).through
        async with manager.session() as session, session.begin():
            await session.execute(text("set local lock_timeout = '500ms'"))
            session.record(change("new"))
        assert await manager.relay().drain() == 1
    assert secondary.sent_to("new")
