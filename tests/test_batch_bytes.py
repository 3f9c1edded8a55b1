"""A budget of bytes for a batch: what does not fit into memory at once is fetched and handed over in parts (D8)."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, Operation, SyncEvent, SyncManager, SyncMode
from outbox.attempt import Attempt, Released, Superseded
from outbox.dispatch import Dispatched, dispatch
from outbox.errors import Unavailable
from outbox.load import load
from outbox.parts import Budget
from outbox.secondaries.base import Applied, Outcome, Retry
from tests.relaying import (
    change,
    claim_by_hand,
    execute,
    hold_of,
    manager_of,
    pending,
    raw,
    rows,
    running,
    value,
    write,
)
from tests.scripted import CheckedSecondary, Hang, ScriptedSecondary
from tests.waiting import eventually

MIB = 1_048_576
SIZE = 10_000
BUDGET = {"batch_bytes": SIZE + SIZE // 2}
"""Room for one content of `SIZE`, and not for two."""

# Made by the server, so that nothing of it has been in this process; on disk it is next to nothing.
FILL = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select 'default', 'Thing', n, 'update', json_build_object('text', repeat('x', 1048000))
    from generate_series(1, 200) as n
    returning event_id, tenant_id, resource_type, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select 'search', hashtextextended(tenant_id, 0) & 63, event_id,
       hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0)
from event
"""


class Weighing(MemorySecondary):
    """Keeps how many bytes each call had, and nothing of them."""

    def __init__(self, backend_id: str = "search") -> None:
        super().__init__(backend_id)
        self.weights: list[int] = []
        self.seen = 0

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        self.weights.append(sum(len(event.content or "") for event in batch))
        self.seen += len(batch)
        return [Applied()] * len(batch)


def large(resource_id: str, size: int = SIZE) -> SyncEvent:
    """An update whose content has just that many bytes."""
    return SyncEvent.update("Thing", resource_id, '{"text":"' + "x" * (size - 11) + '"}')


async def one(primary: AsyncEngine, *, checked: bool = False, **settings: Any) -> tuple[ScriptedSecondary, SyncManager]:
    secondary = CheckedSecondary("search") if checked else ScriptedSecondary("search")
    manager = manager_of(primary, secondary, **(BUDGET | settings))
    await manager.register()
    return secondary, manager


async def test_two_hundred_events_of_a_mebibyte_never_are_in_memory_together(primary: AsyncEngine) -> None:
    """F10: two batches of 4 MiB are in hand at most, with what the driver and the wire add, however well it packs."""
    secondary = Weighing()
    manager = manager_of(primary, secondary, batch_bytes=4 * MIB, attempts_in_flight=2)
    await manager.register()
    await execute(primary, FILL)
    tracemalloc.start()
    try:
        async with running(manager.relay()):
            await eventually(lambda: secondary.seen == 200)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 2 * 4 * MIB
    assert max(secondary.weights) <= 4 * MIB
    assert await value(primary, "select count(*) from outbox_attempt") <= 3
    assert await pending(primary) == 0


async def test_a_batch_that_fits_goes_at_once(primary: AsyncEngine) -> None:
    """D8: the budget is for what is too much, and exact."""
    secondary, manager = await one(primary, batch_bytes=2 * SIZE)
    await write(manager, large("1"), large("2"))
    assert await manager.relay().run_once("search") == 2
    assert [call.names for call in secondary.calls] == [["1", "2"]]


@pytest.mark.parametrize("held", [True, False])
async def test_what_is_loaded_at_once_is_within_the_budget(primary: AsyncEngine, held: bool) -> None:
    """F10: an event gets its share of the bytes, or is left out with its size; together they cannot exceed them."""
    secondary, manager = await one(primary)
    await write(manager, large("1", 100), large("2", 101), change("3"), SyncEvent.delete("Thing", "4"))
    opened = await claim_by_hand(primary, "search", relay_id=UUID(int=1), lease=timedelta(minutes=1))
    assert opened is not None
    async with raw(primary) as connection:
        terms = {"attempt_id": opened.attempt_id, "log_order": False, "held": held, "batch_bytes": 403}
        attempt = await load(connection, "public", backend_id="search", relay_id=UUID(int=1), **terms)
    assert attempt is not None
    assert [event.content and len(event.content) for event in attempt.events] == [100, None, 11, None]
    assert list(attempt.left_out.values()) == [101]
    assert secondary.calls == []


async def test_an_event_above_the_budget_goes_alone(primary: AsyncEngine) -> None:
    """D8: there is no size at which an event would never be delivered."""
    secondary, manager = await one(primary, batch_bytes=1)
    await write(manager, large("1"), change("2"), large("3"), SyncEvent.delete("Thing", "4"))
    assert await manager.relay().run_once("search") == 4
    assert [call.names for call in secondary.calls] == [["4"], ["1"], ["2"], ["3"]]
    assert [event.content for event in secondary.history][1] == large("1").content


@pytest.mark.parametrize("letters", ["ä", "\U0001f600"])
async def test_bytes_are_counted_and_not_characters(primary: AsyncEngine, letters: str) -> None:
    """D8: as they travel, in UTF-8."""
    event = SyncEvent.update("Thing", "1", '{"text":"' + letters * 1_000 + '"}')
    assert event.content is not None
    secondary, manager = await one(primary, batch_bytes=2 * len(event.content.encode()) - 1)
    await write(manager, event, SyncEvent.update("Thing", "2", event.content))
    await manager.relay().run_once("search")
    assert [call.names for call in secondary.calls] == [["1"], ["2"]]


async def test_a_writer_who_waits_hands_over_in_parts_too(primary: AsyncEngine) -> None:
    """D8: by the same hands as a relay."""
    secondary, manager = await one(primary)
    await manager.sync([large("1"), large("2"), change("3")], mode=SyncMode.SYNCHRONOUS)
    assert [call.names for call in secondary.calls] == [["3"], ["1"], ["2"]]
    await manager.aclose()


async def test_what_was_held_goes_in_parts_too(primary: AsyncEngine) -> None:
    """D8: the second attempt of what failed has the same budget as the first."""
    secondary, manager = await one(primary, retry_initial=0.001, retry_max=0.001)
    for name in "123":
        secondary.script(name, Retry("later"))
    await write(manager, large("1"), large("2"), large("3"))
    await manager.relay().run_once("search")
    await execute(primary, "update outbox_hold set next_attempt_at = now()")
    assert await manager.relay().run_once("search") == 3
    assert [call.names for call in secondary.calls] == [["1"], ["2"], ["3"]] * 2
    assert await pending(primary) == 0


async def test_only_the_part_that_hung_is_blamed(primary: AsyncEngine) -> None:
    """B2, F8: what went before it is done, what would have come after it was never tried and is released."""
    secondary, manager = await one(
        primary, checked=True, lease=1.2, attempt_deadline=0.6, retry_initial=30, retry_max=30
    )
    secondary.always("2", Hang())
    await write(manager, large("1"), large("2"), large("3"))
    await manager.relay().run_once("search")
    assert secondary.sent_to("3") == []
    assert await hold_of(primary, "1") is None
    held = await rows(primary, "select resource_id, state, attempts, alone from outbox_hold order by 1")
    assert [tuple(row.values()) for row in held] == [("2", "retrying", 1, True), ("3", "released", 0, False)]


async def test_a_secondary_that_goes_away_between_parts_costs_no_attempt(primary: AsyncEngine) -> None:
    """F8: what was applied stays applied, the rest is released and not even tried."""
    secondary, manager = await one(primary)
    secondary.script("2", Unavailable("refused", "gone"))
    await write(manager, large("1"), large("2"), large("3"))
    await manager.relay().run_once("search")
    assert [call.names for call in secondary.calls] == [["1"], ["2"]]
    counts = await rows(primary, "select applied, released, retried, error_code from outbox_attempt")
    assert [tuple(row.values()) for row in counts] == [(1, 2, 0, "refused")]
    assert await value(primary, "select max(attempts) from outbox_hold") == 0


async def test_one_event_of_a_part_cannot_fail_the_others(primary: AsyncEngine) -> None:
    """F3: an adapter that raises is asked for halves within the part."""
    secondary, manager = await one(primary, batch_bytes=2 * SIZE + SIZE // 2)
    secondary.always("2", RuntimeError())
    await write(manager, *(large(str(number)) for number in range(5)))
    await manager.relay().run_once("search")
    assert [call.names for call in secondary.calls] == [["0", "1"], ["2", "3"], ["2"], ["3"], ["4"]]
    counts = await rows(primary, "select applied, retried from outbox_attempt")
    assert [tuple(row.values()) for row in counts] == [(4, 1)]


async def test_what_is_given_up_between_parts_is_handed_back(primary: AsyncEngine) -> None:
    """L6: a relay that must stop does not go on with parts; nothing is lost and no attempt is spent."""
    secondary, manager = await one(primary)
    secondary.script("2", Hang())
    await write(manager, large("1"), large("2"), large("3"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.calls_with("2"))
    assert secondary.sent_to("3") == []
    assert await rows(primary, "select released, lost from outbox_attempt") == [{"released": 3, "lost": 0}]
    assert await value(primary, "select max(attempts) from outbox_hold") == 0
    await manager.relay().drain()
    assert await pending(primary) == 0
    assert {event.resource_id for event in secondary.history} == {"1", "2", "3"}


async def test_a_primary_that_goes_away_between_parts_is_waited_for(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """S2: its time is not the secondary's: the deadline is for each part, and not for what comes between."""
    secondary, manager = await one(primary, attempt_deadline=1)
    secondary.script("1", Hang())
    await write(manager, large("1"), large("2"))
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        await execute(primary, "alter table outbox rename to taken_away")
        secondary.release()
        await eventually(lambda: caplog.text.count("load failed") >= 3)
        await execute(primary, "alter table taken_away rename to outbox")
        await eventually(lambda: nothing_owed(primary))
    assert [call.names for call in secondary.calls] == [["1"], ["2"]]
    assert await rows(primary, "select applied, released from outbox_attempt") == [{"applied": 2, "released": 0}]


async def nothing_owed(primary: AsyncEngine) -> bool:
    return await pending(primary) == 0


async def test_an_event_that_is_deleted_between_parts_harms_nobody(primary: AsyncEngine) -> None:
    """Somebody deleted it by hand: the others go, and nobody says that it was applied."""
    secondary, manager = await one(primary)
    secondary.script("1", Hang())
    await write(manager, large("1"), large("2"), large("3", SIZE // 2), large("4", SIZE // 2))
    carrying = asyncio.create_task(manager.relay().run_once("search"))
    await eventually(lambda: secondary.running)
    await execute(primary, "delete from outbox where resource_id = '3'")
    secondary.release()
    await carrying
    assert [call.names for call in secondary.calls] == [["1"], ["2"], ["4"]]
    assert await rows(primary, "select applied, released from outbox_attempt") == [{"applied": 3, "released": 1}]
    await write(manager, large("5"))
    await manager.relay().drain()
    assert secondary.calls[-1].names == ["5"]


# The cut itself, without a database


def in_hand(*sizes: int | None, log_order: bool = False, names: str = "abcdefgh") -> Attempt:
    """An attempt of events with such contents; None is for one that was fetched at once and has eight bytes."""
    events = [
        SyncEvent("default", "Thing", name, Operation.UPDATE, '{"ä":1}' if size is None else None, position=position)
        for position, (name, size) in enumerate(zip(names, sizes, strict=False), 1)
    ]
    left_out = {position: size for position, size in enumerate(sizes, 1) if size is not None}
    return Attempt(1, "search", log_order, events, {}, left_out)


async def handed(
    attempt: Attempt, batch_bytes: int, secondary: ScriptedSecondary, *, missing: Sequence[int] = ()
) -> tuple[Dispatched, list[list[int]]]:
    """Dispatch; return what came of it, and what was fetched."""
    fetched: list[list[int]] = []

    async def fetch(positions: Sequence[int]) -> Mapping[int, str]:
        fetched.append(list(positions))
        return {position: "{}" for position in positions if position not in missing}

    ended = await dispatch(secondary, attempt, timedelta(seconds=5), Budget(batch_bytes, fetch))
    return ended, fetched


CUTS: dict[str, tuple[int, list[int | None], list[list[int]]]] = {
    "all fit": (100, [50, 50], [[1, 2]]),
    "one byte too many": (99, [50, 50], [[1], [2]]),
    "what is here leaves room": (101, [None, 50, 43, 50], [[1], [2, 3], [4]]),
    "what is here takes room": (100, [None, 50, 43, 50], [[1], [2], [3], [4]]),
    "what is here takes all the room": (8, [50, None, 50], [[2], [1], [3]]),
    "a larger one alone": (100, [10, 500, 10, 10], [[1], [2], [3, 4]]),
    "a larger one last": (100, [90, 500], [[1], [2]]),
}


@pytest.mark.parametrize("case", CUTS.values(), ids=CUTS)
async def test_parts_fill_the_room_in_order(case: tuple[int, list[int | None], list[list[int]]]) -> None:
    """D8, O1: what is in memory goes first and counts; then as many as fit, at least one, in their order."""
    batch_bytes, sizes, parts = case
    secondary = ScriptedSecondary()
    ended, fetched = await handed(in_hand(*sizes), batch_bytes, secondary)
    assert [call.positions for call in secondary.calls] == parts
    assert fetched == [part for part in parts if sizes[part[0] - 1] is not None]
    assert ended.results == [Applied()] * len(sizes)


async def test_what_is_superseded_is_never_fetched() -> None:
    """D8: only the newest content of a key travels."""
    ended, fetched = await handed(in_hand(50, 60, 70, names="aab"), 100, ScriptedSecondary())
    assert ended.results == [Superseded(), Applied(), Applied()]
    assert fetched == [[2], [3]]


async def test_waves_are_cut_and_a_key_that_failed_gets_no_further_event() -> None:
    """O1: in log order a wave is over before the next begins, however many parts it has."""
    secondary = ScriptedSecondary()
    secondary.script("b", Retry("later"))
    attempt = in_hand(50, 60, 50, 50, 50, log_order=True, names="abcba")
    ended, fetched = await handed(attempt, 100, secondary)
    assert fetched == [[1], [2], [3], [5]]
    assert ended.results == [Applied(), Retry("later"), Applied(), Released(), Applied()]


async def test_an_attempt_that_is_not_ours_any_more_is_not_gone_on_with() -> None:
    """L2: the fetch finds nothing, and nothing more is sent or fetched."""
    secondary = ScriptedSecondary()
    ended, fetched = await handed(in_hand(50, 60, 70), 100, secondary, missing=[2, 3])
    assert [call.positions for call in secondary.calls] == [[1]]
    assert fetched == [[1], [2]]
    assert ended.results == [Applied(), Released(), Released()]


async def test_every_part_has_the_whole_deadline() -> None:
    """Settings: `attempt_deadline` is for what the secondary sees as one batch."""
    secondary = ScriptedSecondary(pace=lambda: 0.4)

    async def fetch(positions: Sequence[int]) -> Mapping[int, str]:
        return dict.fromkeys(positions, "{}")

    ended = await dispatch(secondary, in_hand(50, 50, 50, 50), timedelta(seconds=1), Budget(50, fetch))
    assert ended == Dispatched([Applied()] * 4)
