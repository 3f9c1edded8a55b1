"""Promise 3: for one (secondary, tenant, type, id) never two in flight, and started in commit order."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Operation, Registration, StoredResource, SyncEvent
from outbox.errors import Unavailable
from outbox.secondaries.base import Retry
from tests.relaying import change, hold_of, manager_of, pending, removal, rows, running, value, write
from tests.scripted import ScriptedSecondary, Step, by_key, overlaps
from tests.waiting import eventually

Ordering = Literal["state", "log"]


class Hasty(ScriptedSecondary):
    """Fails now and then, and takes a moment, so that a second start of a key would be seen."""

    def step_for(self, event: SyncEvent) -> Step | None:
        chance = random.random()
        if chance < 0.02:
            return Unavailable("hasty", "")
        return Retry("hasty") if chance < 0.07 else None


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_hot_keys_with_many_relays_have_one_in_flight_in_commit_order(
    primary: AsyncEngine, ordering: Ordering
) -> None:
    """O1, L1: three relays with eight attempts each on six keys, through failures and outages."""
    secondary = Hasty("hot", pace=lambda: random.random() / 50)
    managers = [
        manager_of(
            primary, Registration(secondary, ordering=ordering), batch_size=3, attempts_in_flight=8, max_attempts=1000
        )
        for _ in range(3)
    ]
    await managers[0].register()
    async with running(*(manager.relay() for manager in managers)):
        for number in range(100):
            await write(managers[0], *(change(str(random.randrange(6)), number) for _ in range(3)))
        await eventually(lambda: _nothing_owed(primary), timedelta(seconds=60))

    assert list(overlaps(secondary.calls)) == []
    assert await _most_at_once(primary) > 1, "nothing ever ran beside anything else"
    committed = await _positions(primary)
    for key, sent in by_key(event for call in secondary.calls for event in call.events).items():
        # Over again is allowed, back is not.
        assert sent == sorted(sent)
        assert sent[-1] == committed[key][-1]
        if ordering == "log":
            assert sorted(set(sent)) == committed[key], "every event counts"


async def _nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def _most_at_once(primary: AsyncEngine) -> int:
    return await value(
        primary,
        """
        select max(together) from (
            select count(*) as together
            from outbox_attempt as one join outbox_attempt as other
              on other.started_at <= one.started_at and other.finished_at > one.started_at
            group by one.attempt_id
        ) as counted
        """,
    )


async def _positions(primary: AsyncEngine) -> dict[tuple[str, str, str], list[int]]:
    found: dict[tuple[str, str, str], list[int]] = {}
    for row in await rows(primary, "select * from outbox order by event_id"):
        found.setdefault((row["tenant_id"], row["resource_type"], row["resource_id"]), []).append(row["event_id"])
    return found


@pytest.mark.parametrize("ordering", ["state", "log"])
async def test_a_later_event_waits_while_its_key_is_in_flight(primary: AsyncEngine, ordering: Ordering) -> None:
    """O1: the second relay carries everything but the key that the first has in hand."""
    secondary = ScriptedSecondary("search")
    terms = Registration(secondary, ordering=ordering)
    first, second = manager_of(primary, terms), manager_of(primary, terms)
    await first.register()
    secondary.hang()
    async with running(first.relay()):
        await write(first, change("busy", 1))
        await eventually(lambda: secondary.running)
        await write(first, change("busy", 2), change("free"))
        async with running(second.relay()):
            await eventually(lambda: secondary.sent_to("free"))
            assert len(secondary.sent_to("busy")) == 1
            secondary.release()
            await eventually(lambda: len(secondary.sent_to("busy")) == 2)
    assert list(overlaps(secondary.calls)) == []


async def test_the_same_key_of_two_secondaries_may_be_in_flight_twice(primary: AsyncEngine) -> None:
    """O10: the order at one secondary never waits for another secondary."""
    slow, quick = ScriptedSecondary("slow"), ScriptedSecondary("quick")
    manager = manager_of(primary, slow, quick)
    await manager.register()
    slow.hang()
    async with running(manager.relay()):
        for number in range(3):
            await write(manager, change("shared", number))
            await eventually(lambda count=number + 1: len(quick.sent) == count)
        assert len(slow.sent) == 1
        slow.release()


async def test_in_log_order_a_failing_key_holds_back_only_its_own_later_events(primary: AsyncEngine) -> None:
    """Promises 3 and 7: the later events of the key wait in its hold, all other keys go on; then all come in order."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    secondary.always("failing", Retry("not yet"))
    async with running(manager.relay()):
        for number in range(4):
            await write(manager, change("failing", number), change("fine", number))
        await eventually(lambda: len(secondary.sent_to("fine")) == 4)
        await eventually(lambda: _owes(primary, 4))
        assert len(set(secondary.sent_to("failing"))) == 1
        secondary.heal("failing")
        await eventually(lambda: _nothing_owed(primary))
    kept = by_key(secondary.history)
    assert kept == await _positions(primary)


async def _owes(primary: AsyncEngine, events: int) -> bool:
    hold = await hold_of(primary, "failing")
    return hold is not None and len(hold["event_ids"]) == events


async def test_in_log_order_what_comes_behind_a_failure_in_its_own_batch_is_not_sent(primary: AsyncEngine) -> None:
    """O1 inside one batch: the third of five fails, so the fourth and fifth wait, at no cost."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    await write(manager, *(change("key", number) for number in range(5)))
    positions = [row["event_id"] for row in await rows(primary, "select event_id from outbox order by 1")]
    secondary.script("key", None, None, Retry("third"))

    assert await manager.relay().run_once("archive") == 5
    assert secondary.sent == positions[:3]
    hold = await hold_of(primary, "key")
    assert hold is not None
    assert (hold["event_ids"], hold["attempts"], hold["state"]) == (positions[2:], 1, "retrying")
    (attempt,) = await rows(primary, "select * from outbox_attempt")
    assert (attempt["applied"], attempt["retried"], attempt["released"]) == (2, 1, 2)


async def test_in_state_order_only_the_newest_of_a_batch_is_sent(primary: AsyncEngine) -> None:
    """Coalescing: older events of the same batch count as superseded, a delete after a create included."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    await write(manager, change("kept", 1), change("gone", 1), change("kept", 2), removal("gone"))
    assert await manager.relay().drain() == 4
    (call,) = secondary.calls
    assert [(event.resource_id, event.operation) for event in call.events] == [
        ("kept", Operation.UPDATE),
        ("gone", Operation.DELETE),
    ]
    status = await manager.backend_status("search")
    assert (status.applied, status.superseded) == (2, 2)


async def test_bulk_events_keep_their_place_among_single_ones(primary: AsyncEngine) -> None:
    """O6: a bulk between two updates of one of its resources, in three transactions."""
    secondary = ScriptedSecondary("archive")
    manager = manager_of(primary, Registration(secondary, ordering="log"))
    await manager.register()
    await write(manager, change("a", 1), change("b", 1))
    await write(manager, *SyncEvent.bulk([_resource("a", gone=True), _resource("b", gone=False)]))
    await write(manager, change("a", 3), removal("b"))
    async with running(manager.relay()):
        await eventually(lambda: _nothing_owed(primary))
    kept = [(event.resource_id, event.operation) for event in sorted(secondary.history, key=lambda each: each.key)]
    update, delete = Operation.UPDATE, Operation.DELETE
    assert kept == [("a", update), ("a", delete), ("a", update), ("b", update), ("b", update), ("b", delete)]
    bulk_ids = {event.bulk_id for event in secondary.history}
    assert len(bulk_ids - {None}) == 1


def _resource(resource_id: str, *, gone: bool) -> StoredResource:
    deleted_at = datetime(2020, 1, 1, tzinfo=UTC) if gone else None
    return StoredResource(resource_type="Thing", resource_id=resource_id, content='{"value":2}', deleted_at=deleted_at)
