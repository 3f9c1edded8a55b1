"""Guarantee 10: `wait_for_sync` never says "synced" when it is not (W1, W2, W3, W5)."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, takewhile
from typing import Any

import pytest
from sqlalchemy import Column, Text, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base

from outbox import InvalidToken, Registration, SyncEvent, SyncManager, SyncState, SyncToken, UnknownSecondary, record
from outbox.secondaries.base import Rejected, Retry
from tests.relaying import change, claim_by_hand, execute, manager_of, pending, removal, running, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

KEYS = [str(number) for number in range(12)]


async def one(primary: AsyncEngine, **settings: object) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **settings)
    await manager.register()
    return secondary, manager


async def written(manager: SyncManager, *events: SyncEvent) -> SyncToken:
    async with manager.session() as session:
        session.record(*events)
        await session.commit()
        assert session.token is not None
        return session.token


def reached(secondary: ScriptedSecondary, resource_id: str) -> int:
    """The position that the secondary has applied last for a resource."""
    return max((event.position or 0 for event in secondary.history if event.resource_id == resource_id), default=0)


def _turns(told: dict[SyncState, int]) -> Iterator[int]:
    # On a slow machine a relay may often end before it has carried anything.
    return takewhile(lambda turn: turn < 25 or told[SyncState.APPLIED] <= 20, range(200))


async def test_whoever_is_told_synced_finds_it_there_at_that_moment(primary: AsyncEngine) -> None:
    """W1: under failures, refusals, losses, restarts of the relay and pruning, in state and in log order."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    secondaries = [ScriptedSecondary("newest"), ScriptedSecondary("every")]
    registrations = [secondaries[0], Registration(secondaries[1], ordering="log")]
    manager = manager_of(primary, *registrations, batch_size=3, max_attempts=4, keep_events=0.05, lease=0.5)
    await manager.register()
    told = dict.fromkeys(SyncState, 0)

    async def caller() -> None:
        for _ in _turns(told):
            key = chance.choice(KEYS)
            event = removal(key) if chance.random() < 0.2 else change(key, chance.randrange(1000))
            token = await written(manager, event)
            (position,) = token.positions
            for secondary in secondaries:
                if chance.random() < 0.15:
                    secondary.script(key, chance.choice([Retry("busy"), RuntimeError(), Rejected("malformed")]))
            for status in await manager.wait_for_sync(token, timeout=chance.choice([0, 0.02, 0.3])):
                told[status.state] += 1
                if status.synced:
                    secondary = secondaries[status.backend_id == "every"]
                    assert reached(secondary, key) >= position, f"seed {seed}: {status} of {key} at {position}"

    async def relays() -> None:
        for life in count():
            relay = manager.relay()
            with suppress(TimeoutError):
                # Longer and longer, until one lives long enough on a busy machine to carry something.
                async with asyncio.timeout(chance.uniform(0.05, 0.8 * 1.1**life)):
                    await relay.run()
            if chance.random() < 0.3:
                await claim_by_hand(primary, chance.choice(["newest", "every"]), batch_size=2)

    relaying = asyncio.create_task(relays())
    try:
        await asyncio.gather(*(caller() for _ in range(8)))
    finally:
        relaying.cancel()
        await asyncio.gather(relaying, return_exceptions=True)
        await manager.aclose()
    assert told[SyncState.APPLIED] > 20, f"seed {seed}: {told}"
    assert told[SyncState.ACCEPTED] + told[SyncState.TIMED_OUT] + told[SyncState.FAILING] > 10, f"seed {seed}: {told}"


async def test_an_older_event_is_not_done_while_the_newer_that_superseded_it_is_not(primary: AsyncEngine) -> None:
    """O9: coalesced in one batch, or absorbed by a hold; it is done once the newer one is."""
    secondary, manager = await one(primary, retry_initial=600, retry_max=600)
    secondary.script("1", Retry("busy"))
    first, second = await written(manager, change("1", 1)), await written(manager, change("1", 2))
    await manager.relay().drain()
    for token in (first, second):
        assert (await manager.wait_for_sync(token, timeout=0))["search"].state is SyncState.FAILING
    third = await written(manager, change("1", 3))
    await manager.relay().drain()
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    for token in (first, second, third):
        assert not (await manager.wait_for_sync(token, timeout=0)).synced
    await manager.relay().drain()
    assert reached(secondary, "1") == third.positions[0]
    for token in (first, second, third):
        assert (await manager.wait_for_sync(token, timeout=0)).synced


async def test_nothing_earlier_that_is_still_open_and_no_gap_makes_it_true_early(primary: AsyncEngine) -> None:
    """W2: lower positions that are uncommitted, or rolled back, neither hold one up nor count."""
    secondary, manager = await one(primary)
    async with primary.connect() as open_one, running(manager.relay()):
        await record(open_one, change("open"))
        async with primary.connect() as undone:
            await record(undone, change("undone"))
            await undone.rollback()
        token = await written(manager, change("mine"))
        assert await manager.wait_for_sync(token, timeout=10)
        assert reached(secondary, "mine") == token.positions[0]
        assert not reached(secondary, "open")


async def test_what_is_not_committed_is_never_synced(primary: AsyncEngine) -> None:
    """W3, W6: inside the open transaction, after its rollback, and after a commit that took it along."""
    _, manager = await one(primary)
    async with running(manager.relay()), primary.connect() as connection:
        token = await record(connection, change("1"))
        assert (await manager.wait_for_sync(token, timeout=5))["search"].state is SyncState.UNCOMMITTED
        await connection.rollback()
        assert (await manager.wait_for_sync(token, timeout=5))["search"].state is SyncState.ROLLED_BACK
        token = await record(connection, change("1"))
        await connection.commit()
        assert await manager.wait_for_sync(token, timeout=5)


async def test_a_session_gives_a_token_of_what_its_commit_kept(primary: AsyncEngine) -> None:
    """W3: savepoints that were rolled back are not in it, those that were kept are."""
    _, manager = await one(primary)
    async with manager.session() as session:
        assert session.token is None
        session.record(change("before"))
        async with session.begin_nested():
            session.record(change("kept"))
        undone = await session.begin_nested()
        session.record(change("undone"))
        async with session.begin_nested():
            session.record(change("inner"))
        await undone.rollback()
        session.record(change("after"))
        await session.commit()
        token = session.token
        session.record(change("other"))
        await session.rollback()
        assert session.token == token
    assert token is not None
    async with primary.connect() as connection:
        query = text("select resource_id from outbox where event_id = any (:positions) order by event_id")
        found = await connection.execute(query, {"positions": token.positions})
        assert [row[0] for row in found] == ["before", "kept", "after"]
    assert len(token.positions) == 3


async def test_a_flush_that_fails_in_a_savepoint_takes_nothing_from_the_token_but_what_it_took_back(
    primary: AsyncEngine,
) -> None:
    """W3: what was recorded before the savepoint is still to be waited for, and the relays are told of it."""
    _, manager = await one(primary)
    entity = mapped_class()
    manager.track(entity, resource_type="Note")
    async with primary.begin() as connection:
        await connection.run_sync(entity.metadata.create_all)
    async with manager.session() as session:
        session.add(entity(id="there"))
        await session.commit()
        before = session.token
        session.add(entity(id="kept"))
        with suppress(IntegrityError):
            async with session.begin_nested():
                session.record(change("undone"))
                session.add(entity(id="there"))
                await session.flush()
                pytest.fail("there are two of it")
        session.record(change("after"))
        await session.commit()
        token = session.token
    assert token is not None
    assert token != before
    async with primary.connect() as connection:
        query = text("select resource_id from outbox where event_id = any (:positions) order by event_id")
        found = await connection.execute(query, {"positions": token.positions})
        assert [row[0] for row in found] == ["kept", "after"]


def mapped_class() -> Any:
    """A class of one test alone: what is tracked once is tracked in the whole process."""
    base = declarative_base()
    return type("Note", (base,), {"__tablename__": "note", "id": Column(Text, primary_key=True)})


async def test_what_was_pruned_is_said_to_be_that(primary: AsyncEngine) -> None:
    """W5: whatever was owed of it ended before; that it was applied nobody can say any more."""
    _, manager = await one(primary, keep_events=0.001)
    token = await written(manager, change("1"))
    async with running(manager.relay()):
        assert await manager.wait_for_sync(token, timeout=5)

        async def gone() -> bool:
            return (await manager.wait_for_sync(token, timeout=0))["search"].state is SyncState.PRUNED

        await eventually(gone)
        result = await manager.wait_for_sync(token, timeout=5)
    assert (result["search"].state, bool(result)) == (SyncState.PRUNED, False)


async def test_no_token_and_no_name_is_true_of_nothing(primary: AsyncEngine) -> None:
    """W3: damaged and foreign tokens, an event nobody wants, a secondary that nobody knows."""
    picky = Registration(ScriptedSecondary("picky"), tenant_ids=["acme"])
    manager = manager_of(primary, picky, ScriptedSecondary("later"))
    await manager_of(primary, picky).register()
    unwanted = await written(manager, change("1"))
    assert not await manager.wait_for_sync(unwanted, timeout=0)
    assert (await manager.wait_for_sync(unwanted, timeout=0, backends=["picky"]))["picky"].state is SyncState.NOT_OWED
    await manager.register()
    assert (await manager.wait_for_sync(unwanted, timeout=0, backends=["later"]))["later"].state is SyncState.NOT_OWED
    with pytest.raises(UnknownSecondary):
        await manager.wait_for_sync(unwanted, backends=["nobody"])
    token = await written(manager, change("1", tenant="acme"))
    for damaged in ("", "o1.", token[:-1], token[:-2] + "xy", "o9." + token[3:], "käse"):
        with pytest.raises(InvalidToken):
            await manager.wait_for_sync(damaged)
    elsewhere = SyncToken.of(2**60, 1, [(10**12, ["picky"])])
    assert (await manager.wait_for_sync(elsewhere, timeout=5))["picky"].state is SyncState.UNKNOWN
    assert (await manager.wait_for_sync(elsewhere, timeout=0)) != await manager.wait_for_sync(token, timeout=0)


async def test_dead_paused_and_removed_are_said_at_once(primary: AsyncEngine) -> None:
    """W4: during the wait too; none is a hang, and none is true (SEED check 13, D40)."""
    secondary, manager = await one(primary)
    secondary.always("1", Rejected("malformed", "no"))
    token = await written(manager, change("1"))
    waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=30))
    async with running(manager.relay()):
        dead = (await waiting)["search"]
    assert (dead.state, dead.attempts, dead.error_code, dead.done) == (SyncState.DEAD, 1, "malformed", 0)
    for status, state in (("paused", SyncState.PAUSED), ("removed", SyncState.REMOVED)):
        await execute(primary, "update outbox_secondary set status = 'live'")
        token = await written(manager, change("2"))
        waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=30))
        await execute(primary, f"update outbox_secondary set status = '{status}'")
        assert (await waiting)["search"].state is state
    assert await pending(primary, "search") > 0


async def test_a_newer_event_of_a_dead_key_is_not_called_dead(primary: AsyncEngine) -> None:
    secondary, manager = await one(primary)
    secondary.script("1", Rejected("malformed"))
    first = await written(manager, change("1"))
    await manager.relay().drain()
    second = await written(manager, change("1", 2))
    assert (await manager.wait_for_sync(first, timeout=0))["search"].state is SyncState.DEAD
    assert (await manager.wait_for_sync(second, timeout=0))["search"].state is SyncState.ACCEPTED
    await manager.relay().drain()
    assert await manager.wait_for_sync(first, timeout=0)
    assert await manager.wait_for_sync(second, timeout=0)


async def test_log_order_says_done_event_by_event(primary: AsyncEngine) -> None:
    """O9: the older of a key's events are done before the newer ones are."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering="log"), retry_initial=600, retry_max=600)
    await manager.register()
    tokens = [await written(manager, change("1", value)) for value in range(4)]
    secondary.script("1", None, Retry("busy"))
    await manager.relay().drain()
    states = [(await manager.wait_for_sync(token, timeout=0))["search"].state for token in tokens]
    assert states == [SyncState.APPLIED, SyncState.FAILING, SyncState.FAILING, SyncState.FAILING]
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    await manager.relay().drain()
    for token in tokens:
        assert await manager.wait_for_sync(token, timeout=0)


async def test_log_order_says_done_of_what_fitted_into_an_attempt_and_not_of_the_rest(primary: AsyncEngine) -> None:
    """O9: a hold that owes more than a batch stands for what it still owes, and no longer for what went out."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(
        primary, Registration(secondary, ordering="log"), batch_size=2, retry_initial=600, retry_max=600
    )
    await manager.register()
    tokens = [await written(manager, change("1", value)) for value in range(5)]
    secondary.script("1", Retry("busy"))
    await manager.relay().drain()
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert await manager.relay().run_once("search") == 2
    states = [(await manager.wait_for_sync(token, timeout=0))["search"].state for token in tokens]
    assert states == [SyncState.APPLIED] * 2 + [SyncState.ACCEPTED] * 3
    await manager.relay().drain()
    for token in tokens:
        assert await manager.wait_for_sync(token, timeout=0)


async def test_attempts_and_superseding_are_told_as_they_were(primary: AsyncEngine) -> None:
    """D46: counted by the database, and not made up; an event that another stood for says so."""
    secondary, manager = await one(primary)
    secondary.script("1", Retry("busy"), Retry("busy"))
    token = await written(manager, change("1"))
    async with running(manager.relay()):
        assert (await manager.wait_for_sync(token, timeout=10))["search"].attempts == 3
    older, newer = await written(manager, change("2", 1)), await written(manager, change("2", 2))
    async with running(manager.relay()):
        assert await manager.wait_for_sync(newer, timeout=10)
    assert (await manager.wait_for_sync(older, timeout=0))["search"].state is SyncState.SUPERSEDED
    assert (await manager.wait_for_sync(newer, timeout=0))["search"].state is SyncState.APPLIED


async def test_two_transactions_are_waited_for_with_one_token(primary: AsyncEngine) -> None:
    secondary, manager = await one(primary)
    token = SyncToken.merged([await written(manager, change("1")), await written(manager, change("2"), change("3"))])
    assert len(token.positions) == 3
    waiting = asyncio.create_task(manager.wait_for_sync(token, timeout=10))
    async with running(manager.relay()):
        status = (await waiting)["search"]
    assert (status.events, status.done, status.synced) == (3, 3, True)
    assert len(secondary.history) == 3
    await write(manager, change("4"))


async def test_a_token_is_the_same_however_it_is_put_together(primary: AsyncEngine) -> None:
    _, manager = await one(primary)
    tokens = [await written(manager, change(str(number)), change(f"also-{number}")) for number in range(3)]
    whole = SyncToken.merged(tokens)
    assert SyncToken.merged([*tokens, *tokens, whole]).positions == whole.positions == [1, 2, 3, 4, 5, 6]
    assert SyncToken(str(whole)).recorded == whole.recorded
    assert len(whole) < 120


async def test_a_forged_token_costs_no_more_than_a_look(primary: AsyncEngine) -> None:
    """What comes from outside may claim any number of events; it is looked through a page at a time."""
    _, manager = await one(primary)
    token = _forged(f"3.1.1N{2**62:x}.search")
    result = await manager.wait_for_sync(token, timeout=5)
    assert (result["search"].events, result["search"].done, bool(result)) == (2**62, 0, False)
    assert not await manager.wait_for_sync(_forged(""), timeout=0)
    beyond = f"{2**63:x}"
    numbers = ("-1.1.1.search", f"{beyond}.1.1.search", f"1.{beyond}.1.search", f"1.1.1N{beyond}.search")
    # Each number is a position, and the last of the run is not: asked for, it would fail the look of all who wait.
    numbers += (f"1.1.{2**63 - 1:x}N2.search",)
    for body in (*numbers, "1.1.1." + "x" * 64, "7", "1.1.search", "1.1.1.search~", "1.1.1.S", "1.1.1R.search"):
        token = _forged(body)
        if body.endswith("~"):
            assert not await manager.wait_for_sync(token, timeout=0)
        else:
            with pytest.raises(InvalidToken):
                await manager.wait_for_sync(token)


@pytest.mark.parametrize(
    "runs",
    [
        "3.1.5R5.search",
        "3.1.5N3R7.search",
        "3.1.7R5N3.search",
        "3.1.5.search~3.1.5.archive.search",
        "3.1.5.search~4.1.5.search",
    ],
)
async def test_a_token_that_names_an_event_twice_is_none_and_fails_nobody_else(primary: AsyncEngine, runs: str) -> None:
    """It would be counted twice and looked for once, and its look is that of all who wait here."""
    _, manager = await one(primary)
    waiting = asyncio.create_task(manager.wait_for_sync(await written(manager, change("1")), timeout=10))
    with pytest.raises(InvalidToken):
        await manager.wait_for_sync(_forged(runs), timeout=0.3)
    async with running(manager.relay()):
        assert await waiting


async def test_a_token_may_name_one_position_with_the_stamps_of_two_transactions(primary: AsyncEngine) -> None:
    """A crash gives a position again, and each of them is an event of its own."""
    _, manager = await one(primary)
    result = await manager.wait_for_sync(_forged("3.1.5.search~3.2.5.search"), timeout=5)
    assert (result["search"].events, result["search"].done) == (2, 0)


def _forged(body: str) -> str:
    return f"o1.{zlib.crc32(body.encode()):08x}.{body}"
