"""Attempts and the delays between them: counted where they are claimed, kept in the database, decided by tenacity."""

from __future__ import annotations

import asyncio
import random
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import stop_after_attempt, stop_after_delay, wait_incrementing

from outbox import Registration, RetryPolicy, SyncManager, Which
from outbox.attempt import Attempt
from outbox.load import load
from outbox.secondaries.base import Outcome, Rejected, Retry
from tests.relay_process import Effects, RelayProcess, effects_in, told
from tests.relaying import (
    change,
    claim_by_hand,
    dsn_of,
    execute,
    hold_of,
    manager_of,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import Hang, ScriptedSecondary
from tests.waiting import eventually


async def one(primary: AsyncEngine, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def test_attempts_are_the_claims_that_may_have_been_dispatched(primary: AsyncEngine) -> None:
    """B2: failures, losses and timeouts count one each, hand-backs none."""
    secondary, manager = await one(primary, retry_initial=0.001, retry_max=0.001)
    await write(manager, change("1"))
    secondary.script("1", Retry("one"), Retry("two"), RuntimeError(), Hang())
    for _ in range(3):
        await eventually(lambda: manager.relay().run_once("search"))
    # The fourth claim is lost, the fifth handed back.
    assert await eventually(lambda: claim_by_hand(primary, "search"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["attempts"], hold["lost"]) == (4, 1)
    counts = await rows(primary, "select sum(retried + lost) as spent, sum(released) as released from outbox_attempt")
    assert counts == [{"spent": 4, "released": 1}]


async def test_what_failed_and_is_handed_back_is_a_failure_still(primary: AsyncEngine) -> None:
    """B6: as it was before it was claimed, so that whoever stops relays to give it up finds it."""
    secondary, manager = await one(primary, retry_initial=0.001, retry_max=0.001)
    await write(manager, change("1"))
    secondary.script("1", Retry("busy"), Hang())
    assert await manager.relay().run_once("search") == 1
    (before,) = await manager.failures()
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
    after = await manager.failures()
    assert [msgspec.structs.replace(each, next_attempt_at=before.next_attempt_at) for each in after] == [before]
    assert (await manager.backend_status("search")).failing == 1
    assert await manager.discard(Which(resource_id="1"), reason="never mind") == 1


async def test_delays_come_from_stored_attempts_through_restarts(primary: AsyncEngine) -> None:
    """B1: each failure is seen by a new relay, with a tenacity policy of one's own, until it says stop."""
    policy = RetryPolicy(wait_incrementing(100, 50), stop_after_attempt(4), timedelta(seconds=180))
    secondary = ScriptedSecondary("search")
    waits = []
    for _ in range(4):
        manager = manager_of(primary, secondary, retry=policy)
        await manager.register()
        if not waits:
            secondary.always("1", Retry("busy"))
            await write(manager, change("1"))
        assert await manager.relay().drain() == 1
        hold = await hold_of(primary, "1")
        assert hold is not None
        waits.append(
            hold["next_attempt_at"] and round((hold["next_attempt_at"] - hold["last_failed_at"]).total_seconds())
        )
        await execute(primary, "update outbox_hold set next_attempt_at = now() where state = 'retrying'")
    assert waits == [100, 150, 180, None], "the third is capped, the fourth failure is the last"


async def test_a_policy_may_stop_by_the_time_since_the_first_failure(primary: AsyncEngine) -> None:
    """Design, retry: the age of the failure is the database's."""
    policy = RetryPolicy(wait_incrementing(1, 1), stop_after_delay(3600), timedelta(seconds=180))
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, retry=policy)
    await manager.register()
    secondary.always("1", Retry("busy"))
    await write(manager, change("1"))
    for age, state in ((0, "retrying"), (59, "retrying"), (61, "dead")):
        earlier = f"next_attempt_at = now(), first_failed_at = now() - interval '{age} minutes'"
        await execute(primary, f"update outbox_hold set {earlier}")
        assert await manager.relay().drain() == 1
        hold = await hold_of(primary, "1")
        assert hold is not None
        assert hold["state"] == state


@pytest.mark.parametrize("first", [Rejected("poison"), Retry("poison")], ids=["dead", "retrying"])
async def test_a_newer_event_is_not_as_old_a_failure_as_the_one_it_supersedes(
    primary: AsyncEngine, first: Outcome
) -> None:
    """A policy that stops by time gives version 4 its own hour, whatever 3 had used up."""
    policy = RetryPolicy(wait_incrementing(1, 1), stop_after_delay(3600), timedelta(seconds=180))
    secondary, manager = await one(primary, retry=policy)
    secondary.script("1", first, Retry("busy"))
    await write(manager, change("1", 3))
    assert await manager.relay().drain() == 1
    earlier = "first_failed_at = now() - interval '2 hours'"
    await execute(primary, f"update outbox_hold set {earlier}, next_attempt_at = now() where state = 'retrying'")
    await execute(primary, f"update outbox_hold set {earlier}")
    await write(manager, change("1", 4))
    assert await manager.relay().drain() == 1
    hold = await hold_of(primary, "1")
    assert hold is not None
    assert (hold["error_code"], hold["state"], hold["attempts"]) == ("busy", "retrying", 1)


async def test_a_restart_makes_nothing_due_early(primary: AsyncEngine) -> None:
    """B1: the relay that saw the failure is gone; others find the same time."""
    secondary, manager = await one(primary, retry_initial=600, retry_max=600)
    secondary.always("1", Retry("busy", after=timedelta(seconds=600)))
    await write(manager, change("1"))
    async with running(manager.relay()):
        await eventually(lambda: hold_of(primary, "1"))
    before = await hold_of(primary, "1")
    for _ in range(3):
        assert await manager.relay().drain() == 0
    assert await hold_of(primary, "1") == before
    assert len(secondary.sent) == 1


async def test_a_retry_after_of_one_event_lengthens_its_wait_up_to_the_cap(primary: AsyncEngine) -> None:
    """B4: asked of one event; clamped to `retry_max`."""
    secondary, manager = await one(primary, retry_initial=0.01, retry_max=100)
    asked = {"none": None, "some": timedelta(seconds=50), "much": timedelta(days=9), "negative": timedelta(days=-9)}
    for name, after in asked.items():
        secondary.always(name, Retry("busy", after=after))
    await write(manager, *(change(name) for name in asked))
    await manager.relay().run_once("search")
    held = await rows(primary, "select resource_id, next_attempt_at - last_failed_at as wait from outbox_hold")
    waits = {row["resource_id"]: row["wait"].total_seconds() for row in held}
    assert waits["some"] == pytest.approx(50)
    assert waits["much"] == pytest.approx(100)
    assert 0 <= waits["none"] < 1
    assert 0 <= waits["negative"] < 1


async def test_only_the_holder_of_an_open_attempt_can_load_it(primary: AsyncEngine) -> None:
    """L2: a relay that wakes up between its claim and its load finds that the attempt is no longer its own."""
    secondary, manager = await one(primary)
    await write(manager, change("1"))
    attempt = await claim_by_hand(primary, "search", relay_id=UUID(int=1), lease=timedelta(minutes=1))
    assert attempt is not None

    async def loaded(relay_id: int) -> Attempt | None:
        names: dict[str, Any] = {"backend_id": "search", "relay_id": UUID(int=relay_id)}
        async with raw(primary) as connection:
            terms = {"attempt_id": attempt.attempt_id, "log_order": False, "held": False, "batch_bytes": 2**24}
            return await load(connection, "public", **names, **terms)

    mine = await loaded(1)
    assert mine == attempt
    assert [event.content for event in mine.events] == [change("1").content]
    assert await loaded(2) is None
    await execute(primary, "update outbox_attempt set finished_at = now()")
    assert await loaded(1) is None
    assert secondary.sent == []


TRANSITIONS = """
create table died (state text, attempts integer, error_code text, error text);
create function note_death() returns trigger language plpgsql as $$
begin
    if tg_op = 'INSERT' or old.state <> 'dead' or old.attempts <> new.attempts then
        insert into died values (new.state, new.attempts, new.error_code, new.error);
    end if;
    return null;
end $$;
create trigger note_death after insert or update on outbox_hold
    for each row when (new.state = 'dead') execute function note_death()
"""


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_an_event_dies_exactly_once_however_often_its_relays_are_killed(
    primary: AsyncEngine, database: str, tmp_path: Path, ordering: Any
) -> None:
    """B6, B2: killed with the event in hand and about to be settled; attempts are the claims, and the error stays."""
    most = 6
    manager = manager_of(primary, Registration(ScriptedSecondary("effects"), ordering=ordering))
    await manager.register()
    async with raw(primary) as connection:
        await connection.execute(TRANSITIONS)
    settings = {"lease": 0.3, "max_attempts": most, "retry_initial": 0.001, "retry_max": 0.001}
    await write(manager, told("poison", "retry"))
    async with effects_in(database) as effects:
        for round_ in range(4 * most):
            asked = len(await effects.asked("poison"))
            terms = {"backends": {"effects": ordering}, **settings}
            with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", **terms) as relay:
                await write(manager, change(f"fine-{round_}"))
                await eventually(lambda asked=asked: _asked_or_dead(primary, effects, asked))
                # A moment of chance: before, in or after the settle.
                await asyncio.sleep(random.uniform(0, 0.01))
                relay.kill()
            if await value(primary, "select count(*) from died"):
                break
        with RelayProcess(dsn_of(primary), effects.dsn, tmp_path / "log", **terms):
            await write(manager, change("last"))
            await eventually(lambda: effects.asked("last"))
            await eventually(lambda: value(primary, "select count(*) = 1 from outbox_hold"))
    assert [row["attempts"] for row in await rows(primary, "select * from died")] == [most]
    hold = await hold_of(primary, "poison")
    assert hold is not None
    assert (hold["state"], hold["attempts"], hold["next_attempt_at"]) == ("dead", most, None)
    assert hold["error_code"] in ("told", "lost")
    spent = """
    select count(*) from outbox_attempt, unnest(event_ids) as owed (event_id)
    where owed.event_id = :poison and retried + lost > 0
    """
    assert await value(primary, spent, poison=hold["event_ids"][0]) == most


async def _asked_or_dead(primary: AsyncEngine, effects: Effects, already: int) -> bool:
    dead = await value(primary, "select count(*) from died")
    return bool(dead) or len(await effects.asked("poison")) > already


async def test_the_history_of_a_key_that_fails_for_ever_is_bounded(primary: AsyncEngine) -> None:
    """B7: one row however often it failed, of bounded size whatever the error says; attempts go when they are old."""
    often = {"retry_initial": 0.001, "retry_max": 0.001, "max_attempts": 1_000_000}
    secondary, manager = await one(primary, **often, keep_attempts=0.05, prune_interval=0.02)
    secondary.always("1", Retry("busy" * 10_000, "ä" * 500_000))
    await write(manager, change("1"))
    size = "select pg_column_size(hold.*) from outbox_hold as hold"
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select max(attempts) >= 2 from outbox_hold"))
    first = await value(primary, size)
    # As if it had gone on for days; between two relays, since an attempt in hand knows how many there were before it.
    await execute(primary, "update outbox_hold set attempts = 100000")
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select attempts >= 100100 from outbox_hold"))
        assert await value(primary, "select count(*) from outbox_hold") == 1
        assert await value(primary, size) <= first + 16
        await eventually(lambda: value(primary, "select min(attempt_id) > 50 from outbox_attempt"))
    (hold,) = await rows(primary, "select error_code, error, cardinality(event_ids) as owed from outbox_hold")
    assert (len(hold["error_code"]), len(hold["error"]), hold["owed"]) == (64, 1024, 1)
    status = await manager.backend_status("search")
    assert status.retried >= 100, "what is gone is still counted"
