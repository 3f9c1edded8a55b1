"""Housekeeping: all that is old goes, in steps, and no round walks again through all that stays."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncManager, prune
from outbox.housekeeping import Housekeeper
from outbox.primary import Primary
from tests.relaying import change, claim_by_hand, execute, manager_of, quick, raw, rows, value, write
from tests.scripted import ScriptedSecondary

AGED_ATTEMPTS = """
insert into outbox_attempt (backend_id, relay_id, event_ids, key_hashes, lease_until, finished_at, applied)
select 'search', gen_random_uuid(), array[n], array[n], now(), now() - interval '8 days', 1
from generate_series(1, 2001) as n
"""
ALL_FOLDED = "update outbox_secondary set folded_through = (select max(attempt_id) from outbox_attempt)"
ATTEMPTS = "select count(*) from outbox_attempt"
EVENTS = "select count(*) from outbox"
NOTES = "select count(*) from outbox_discarded"
GIVEN_UP = """
insert into outbox_discarded (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events,
                              attempts, reason, discarded_at)
select 'search', n, 1000 + n, 1000 + n, 't', 'Thing', n::text, 1, 1, 'no use',
       now() - interval '8 days' - n / 3 * interval '1 s'
from generate_series(1, 20) as n
"""


async def registered(primary: AsyncEngine) -> SyncManager:
    manager = manager_of(primary, ScriptedSecondary("search"))
    await manager.register()
    return manager


@asynccontextmanager
async def keeper(primary: AsyncEngine, **settings: Any) -> AsyncIterator[Housekeeper]:
    config = quick(keep_events=3600, keep_attempts=7 * 86_400, **settings)
    connections = Primary(primary, config)
    await connections.open()
    try:
        yield Housekeeper(connections, config, [])
    finally:
        await connections.close()


async def age(primary: AsyncEngine, names: str = "%") -> None:
    """Make events old, and owed to nobody any more."""
    await execute(
        primary, "update outbox set created_at = now() - interval '2 hours' where resource_id like :n", n=names
    )
    await execute(
        primary,
        "delete from outbox_delivery where event_id in (select event_id from outbox where resource_id like :n)",
        n=names,
    )


async def test_more_attempts_than_a_page_are_pruned_in_one_round(primary: AsyncEngine) -> None:
    """G5: else those who make many a second would be kept ever longer."""
    await registered(primary)
    await execute(primary, AGED_ATTEMPTS)
    await execute(primary, ALL_FOLDED)
    async with keeper(primary, prune_interval=60) as housekeeper:
        await housekeeper.tidy()
    assert await value(primary, ATTEMPTS) == 0


async def test_a_round_takes_no_longer_than_its_interval_and_the_next_goes_on(primary: AsyncEngine) -> None:
    await registered(primary)
    await execute(primary, AGED_ATTEMPTS)
    await execute(primary, ALL_FOLDED)
    left = []
    async with keeper(primary, prune_interval=0.0001) as housekeeper:
        for _ in range(3):
            await housekeeper.tidy()
            left.append(await value(primary, ATTEMPTS))
    assert left == [1001, 1, 0]


async def test_a_round_goes_on_where_the_last_one_was_and_begins_anew_now_and_then(primary: AsyncEngine) -> None:
    """What was passed by because it was owed is not walked through again every few seconds, but it is not forgotten."""
    manager = await registered(primary)
    await write(manager, change("owed"), change("done"))
    await execute(primary, "update outbox set created_at = now() - interval '2 hours'")
    await age(primary, "done")
    async with keeper(primary) as housekeeper:
        await housekeeper.tidy()
        assert [row["resource_id"] for row in await rows(primary, "select resource_id from outbox")] == ["owed"]
        await write(manager, change("later"))
        await age(primary)
        await housekeeper.tidy()
        assert [row["resource_id"] for row in await rows(primary, "select resource_id from outbox")] == ["owed"]
        before = time.monotonic()
        housekeeper._anew_at = 0.0
        await housekeeper.tidy()
        assert housekeeper._anew_at >= before + 600
        await housekeeper.tidy()
    assert await value(primary, EVENTS) == 0


async def test_what_becomes_old_later_is_met_where_the_walk_ended(primary: AsyncEngine) -> None:
    """A walk ends before the first that is young, also when what is behind it is old."""
    manager = await registered(primary)
    await write(manager, change("1 old"), change("2 young"), change("3 old"))
    await age(primary, "%old")
    await execute(primary, "delete from outbox_delivery")
    async with keeper(primary) as housekeeper:
        await housekeeper.tidy()
        assert [row["resource_id"] for row in await rows(primary, "select resource_id from outbox")] == ["2 young"]
        await age(primary)
        await housekeeper.tidy()
    assert await value(primary, EVENTS) == 0


@pytest.mark.parametrize("wrong", [timedelta(days=7000), timedelta(days=-7000)], ids=["ahead", "behind"])
async def test_times_of_a_clock_that_was_wrong_keep_nothing_from_being_pruned(
    primary: AsyncEngine, wrong: timedelta
) -> None:
    """T1: more than a page of events and attempts of a time that is far from now, before others that are old."""
    manager = await registered(primary)
    await execute(primary, AGED_ATTEMPTS)
    await execute(primary, ALL_FOLDED)
    await write(manager, *(change(str(number)) for number in range(1_100)), *(change(f"{n} old") for n in range(5)))
    await age(primary)
    of_that_time = "now() + cast(:wrong as interval)"
    await execute(
        primary, f"update outbox set created_at = {of_that_time} where resource_id not like '%old'", wrong=wrong
    )
    await execute(
        primary, f"update outbox_attempt set finished_at = {of_that_time} where attempt_id < 1100", wrong=wrong
    )
    async with keeper(primary, prune_interval=60) as housekeeper:
        await housekeeper.tidy()
    assert (await value(primary, EVENTS), await value(primary, ATTEMPTS)) == (0, 0)


async def test_what_fails_keeps_nothing_else_from_being_done(primary: AsyncEngine) -> None:
    """A lock on one table, or a statement that takes too long, must not let the others grow."""
    manager = await registered(primary)
    await write(manager, change("1"))
    await age(primary)
    await execute(primary, AGED_ATTEMPTS)
    await execute(primary, ALL_FOLDED)
    settings = {"prune_interval": 60, "statement_timeout": 0.2}
    async with keeper(primary, **settings) as housekeeper, raw(primary) as rude, rude.transaction():
        await rude.execute("lock table outbox_discarded in access exclusive mode")
        await housekeeper.tidy()
    assert (await value(primary, EVENTS), await value(primary, ATTEMPTS)) == (0, 0)


async def test_notes_are_pruned_page_by_page_past_those_that_must_stay(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that share a time none is passed by with the page that ends among them."""
    monkeypatch.setattr(prune, "_PAGE", 4)
    manager = await registered(primary)
    await write(manager, change("kept"))
    await execute(primary, GIVEN_UP)
    # The oldest ones stand for an event that is still there.
    await execute(
        primary,
        "update outbox_discarded set event_id = (select event_id from outbox), oldest_id = 0 where key_hash >= 15",
    )
    async with keeper(primary, prune_interval=60) as housekeeper:
        await housekeeper.tidy()
    assert [row["key_hash"] for row in await rows(primary, "select key_hash from outbox_discarded order by 1")] == [
        *range(15, 21)
    ]


async def test_a_fold_goes_step_by_step_and_counts_once(primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """G2: what one attempt that stayed open for hours held up is more than one statement can take."""
    monkeypatch.setattr(prune, "_MOST_FOLDED", 400)
    await registered(primary)
    await execute(primary, AGED_ATTEMPTS)
    applied = []
    async with raw(primary) as connection:
        for _ in range(7):
            await prune.fold(connection, "public", "search")
            applied.append(await value(primary, "select applied from outbox_secondary"))
    assert applied == [400, 800, 1200, 1600, 2000, 2001, 2001]


async def test_a_key_that_owes_much_is_kept_whole(primary: AsyncEngine) -> None:
    """G1, log order: each event of a long hold, also where a page ends among them."""
    manager = await registered(primary)
    await write(manager, *(change("long", number) for number in range(30)), change("free"))
    assert await claim_by_hand(primary, "search", lease=timedelta(minutes=5))
    await execute(primary, "delete from outbox_attempt")
    await execute(
        primary,
        """
        insert into outbox_hold (backend_id, tenant_id, resource_type, resource_id, key_hash, event_ids, oldest_id,
                                 owed_since, state, attempts)
        select 'search', tenant_id, resource_type, resource_id,
               hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0),
               array_agg(event_id order by event_id), min(event_id), now(), 'dead', 1
        from outbox where resource_id = 'long' group by 2, 3, 4
        """,
    )
    await age(primary)
    async with keeper(primary) as housekeeper:
        await housekeeper.tidy()
    assert await value(primary, EVENTS) == 30
