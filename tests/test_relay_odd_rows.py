"""Rows that no version of ours wrote, or a newer one: they harm nobody else (F4)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import OutboxError, Registration, Retry, SyncManager
from outbox.schema import LANES
from outbox.seize import seize
from outbox.turn import take_turn
from tests.relaying import change, execute, hold_of, manager_of, pending, raw, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

A_MINUTE = timedelta(minutes=1)
Pair = tuple[ScriptedSecondary, SyncManager]


async def pair_of(primary: AsyncEngine, ordering: Any) -> Pair:
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, Registration(secondary, ordering=ordering), retry_initial=600, retry_max=600)
    await manager.register()
    return secondary, manager


@pytest.fixture
async def pair(primary: AsyncEngine) -> Pair:
    return await pair_of(primary, "state")


@pytest.fixture(params=["state", "log"])
async def either_pair(primary: AsyncEngine, request: pytest.FixtureRequest) -> Pair:
    return await pair_of(primary, request.param)


async def others_go_on(pair: Pair) -> None:
    """New events arrive, twice, with time enough in between for a lost attempt to be found."""
    secondary, manager = pair
    async with running(manager.relay()):
        for number in range(2):
            await write(manager, change("fine", number), change("fine", number, tenant="other"))
            await eventually(lambda count=2 * number + 2: len(secondary.sent_to("fine")) == count)
            await eventually(lambda: _no_open_attempt(manager.engine))


async def _no_open_attempt(primary: AsyncEngine) -> bool:
    return await value(primary, "select count(*) from outbox_attempt where finished_at is null") == 0


async def test_an_operation_of_a_newer_version_is_a_visible_failure(primary: AsyncEngine, either_pair: Pair) -> None:
    """A row that this version cannot read is retrying with a code that says so; it is not sent, and not lost."""
    secondary, manager = either_pair
    await execute(primary, "alter table outbox drop constraint outbox_operation_known")
    await write(manager, change("odd"), change("beside"))
    await execute(primary, "update outbox set operation = 'merge' where resource_id = 'odd'")
    await others_go_on(either_pair)
    (failure,) = await manager.failures()
    assert (failure.resource_id, failure.state, failure.error_code) == ("odd", "retrying", "unknown_operation")
    assert secondary.sent_to("odd") == []
    assert secondary.sent_to("beside")
    assert await pending(primary) == 1


async def test_deliveries_of_a_secondary_that_nobody_knows_stay_and_harm_nobody(
    primary: AsyncEngine, pair: Pair
) -> None:
    """They are owed to somebody else; nobody here may take them or forget them."""
    await write(pair[1], change("1"))
    unknown = "insert into outbox_delivery select 'unknown', lane, event_id, key_hash from outbox_delivery"
    await execute(primary, unknown)
    await others_go_on(pair)
    assert await value(primary, "select count(*) from outbox_delivery where backend_id = 'unknown'") == 1
    assert await value(primary, "select count(*) from outbox_delivery where backend_id <> 'unknown'") == 0
    assert [status.backend_id for status in await pair[1].all_statuses()] == ["search"]


@pytest.mark.parametrize("beside", [True, False], ids=["among others", "by itself"])
async def test_a_delivery_whose_event_is_gone_harms_nobody(
    primary: AsyncEngine, either_pair: Pair, beside: bool
) -> None:
    """Somebody deleted the event by hand; the attempt that takes the rest of it must come to an end."""
    secondary, manager = either_pair
    await write(manager, change("gone"), *([change("beside")] if beside else []))
    await execute(primary, "delete from outbox where resource_id = 'gone'")
    await manager.relay().run_once("search")
    await others_go_on(either_pair)
    assert secondary.sent_to("gone") == []
    assert bool(secondary.sent_to("beside")) == beside


async def test_a_hold_whose_event_is_gone_harms_nobody(primary: AsyncEngine, either_pair: Pair) -> None:
    """The same, after a first failure."""
    secondary, manager = either_pair
    secondary.always("gone", RuntimeError())
    await write(manager, change("gone"))
    assert await manager.relay().drain() == 1
    await execute(primary, "delete from outbox where resource_id = 'gone'")
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    await manager.relay().run_once("search")
    await others_go_on(either_pair)
    assert len(secondary.sent_to("gone")) == 1


ODD_VALUES: dict[str, str] = {
    "headers are a list": "headers = '[1, 2]'",
    "headers are null in JSON": "headers = 'null'",
    "content is no object": "content = '[]'",
    "content has a key twice": """content = '{"a": 1, "a": 2}'""",
    "a very long version": "version = repeat('x', 100000)",
    "from the far future": "created_at = 'infinity'",
    "from the far past": "created_at = '-infinity'",
    "before our era": "created_at = '0044-03-15 00:00:00+00 BC'",
    "control characters": "resource_id = resource_id || chr(1) || chr(10)",
    "a FHIR release to come": "fhir_version = '99.0'",
    "a tenant with spaces": "tenant_id = 'a tenant, with: odd; signs'",
}


@pytest.mark.parametrize("odd", ODD_VALUES.values(), ids=ODD_VALUES.keys())
async def test_odd_values_in_an_event_harm_nobody(primary: AsyncEngine, pair: Pair, odd: str) -> None:
    """F4: inserted by hand, or by a version with other checks; sent as they are, or failing by themselves."""
    secondary, manager = pair
    await write(manager, change("odd"), change("beside"))
    await execute(primary, f"update outbox set {odd} where resource_id = 'odd'")
    await others_go_on(pair)
    assert secondary.sent_to("beside")
    assert await pending(primary) <= 1


@pytest.mark.parametrize(
    "odd",
    [
        "lane = (lane + 1) % 64",
        "key_hash = 0",
        "key_hash = -9223372036854775808",
    ],
)
async def test_odd_values_in_a_delivery_harm_nobody(primary: AsyncEngine, pair: Pair, odd: str) -> None:
    """F4: a lane or a hash that another way of computing them gave."""
    secondary, manager = pair
    await write(manager, change("odd"), change("beside"))
    where = "where event_id = (select event_id from outbox where resource_id = 'odd')"
    await execute(primary, f"update outbox_delivery set {odd} {where}")
    await others_go_on(pair)
    assert secondary.sent_to("odd")
    assert await pending(primary) == 0


async def test_two_keys_with_one_hash_are_still_two_keys(primary: AsyncEngine, either_pair: Pair) -> None:
    """A collision costs parallel work, never an event: one fails, the other is delivered, and neither twice at once."""
    secondary, manager = either_pair
    secondary.always("failing", RuntimeError())
    await write(manager, change("failing"), change("twin"))
    await execute(primary, "update outbox_delivery set key_hash = 42")
    assert await manager.relay().drain() == 2
    await execute(primary, "update outbox_hold set key_hash = 42")
    await write(manager, change("failing", 2), change("twin", 2))
    await execute(primary, "update outbox_delivery set key_hash = 42")
    async with running(manager.relay()):
        await eventually(lambda: secondary.content_of("Thing", "twin") == '{"value":2}')
    assert await hold_of(primary, "failing") is not None
    assert await hold_of(primary, "twin") is None


async def test_a_secondary_registered_by_somebody_else_is_left_to_them(primary: AsyncEngine, pair: Pair) -> None:
    """Another deployment's secondary is owed its events; this relay neither serves nor drops them."""
    _, manager = pair
    theirs: Any = ScriptedSecondary("theirs")
    await manager_of(primary, theirs).register()
    await write(manager, change("1"))
    await others_go_on(pair)
    assert await pending(primary, "theirs") == 5
    assert theirs.calls == []


@pytest.mark.parametrize("take", ["claim", "resume", "seize"])
async def test_an_attempt_whose_number_was_counted_before_is_not_opened(
    primary: AsyncEngine, pair: Pair, take: str
) -> None:
    """S5: nobody would see it: neither that its keys are in hand, nor that its lease ran out."""
    secondary, manager = pair
    await write(manager, change("1"))
    await manager.relay().drain()
    await execute(primary, "update outbox_secondary set folded_through = 100")
    if take == "resume":
        secondary.script("1", Retry("busy"))
        await execute(primary, "select setval('outbox_attempt_attempt_id_seq', 100)")
        await write(manager, change("1", 1))
        await manager.relay().drain()
        assert await manager.redrive() == 1
    await execute(primary, "delete from outbox_attempt")
    await execute(primary, "alter sequence outbox_attempt_attempt_id_seq restart")
    if take != "resume":
        await write(manager, change("2"))
    with pytest.raises(OutboxError, match="outbox doctor"):
        await (_seize_all(primary) if take == "seize" else manager.relay().run_once("search"))
    assert await pending(primary) == 1
    assert await value(primary, "select count(*) from outbox_attempt") == 0


async def _seize_all(primary: AsyncEngine) -> None:
    event_ids = [row["event_id"] for row in await rows(primary, "select event_id from outbox_delivery")]
    terms: dict[str, Any] = {
        "relay_id": uuid4(),
        "batch_size": 10,
        "floors": [0] * LANES,
        "lease": timedelta(minutes=1),
    }
    async with raw(primary) as connection, connection.transaction():
        turn = await take_turn(connection, "public", "search")
        assert turn is not None
        await seize(connection, "public", backend_id="search", turn=turn, event_ids=event_ids, **terms)
