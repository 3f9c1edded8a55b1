"""Guarantee 11, backfill: everything that was there arrives, through kills, beside writers, prune and each other."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, Unavailable
from tests.backfilling import STEPS, World, before_each_statement, families
from tests.relaying import dsn_of, execute, pending, rows, running, value
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

ROOT = Path(__file__).parent.parent.parent
RECORDED = "select resource_id, count(*) from outbox group by resource_id"


async def recorded(engine: AsyncEngine) -> Counter[str]:
    return Counter({row["resource_id"]: row["count"] for row in await rows(engine, RECORDED)})


async def write_on(world: World, seed: int) -> None:
    """Change, add and take away at random, for ever."""
    chance = random.Random(seed)
    while True:
        number = chance.randrange(1, 400)
        if chance.random() < 0.3:
            await world.delete(number)
        else:
            await world.write(number, f"New-{seed}-{chance.random()}")


@pytest.mark.parametrize("seed", [1, 2])
async def test_beside_writers_and_prune_the_secondary_ends_up_as_the_primary_is(
    primary: AsyncEngine, seed: int
) -> None:
    """K3, G2: a real relay carries and prunes at once, writers take rows from under the pages."""
    chance = random.Random(seed)
    secondary = ScriptedSecondary("mirror", pace=lambda: chance.random() / 200)
    world = World(primary, secondary, keep_events=0.01, prune_interval=0.02, batch_size=20)
    await world.prepare(300)
    async with running(world.manager.relay()):
        writing = [asyncio.create_task(write_on(world, seed * 10 + number)) for number in range(3)]
        done = await world.manager.backfill("mirror", most_owed=20)
        for each in writing:
            each.cancel()
        await asyncio.gather(*writing, return_exceptions=True)
        await eventually(lambda: nothing_pending(primary))
    assert done.finished
    assert await value(primary, "select count(*) from outbox") < 300, "prune never came in between"
    assert families(secondary) == await world.held()


async def nothing_pending(engine: AsyncEngine) -> bool:
    return await pending(engine) == 0


async def test_cancelled_at_every_statement_it_goes_on_where_it_was(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K4: one row a page; whatever statement it was cancelled at, no row is left out and none recorded twice."""
    monkeypatch.setattr("outbox.backfill._LARGEST_PAGE", 1)
    world = World(primary)
    await world.prepare(3)
    number, finished = 0, False
    while not finished:
        number += 1
        await execute(primary, "truncate outbox, outbox_delivery, outbox_backfill")
        finished = await _cancelled_at(world, number)
        assert max((await recorded(primary)).values(), default=0) <= 1
        assert (await world.manager.backfill("mirror", most_owed=None)).finished
        assert await recorded(primary) == {f"north/{patient}": 1 for patient in (1, 2, 3)}
    assert number > 3 * (len(STEPS) - 1), "there are more statements than that"


async def _cancelled_at(world: World, number: int) -> bool:
    """Run until statement `number`; return whether it came to its end before."""
    seen = 0
    working = asyncio.ensure_future(world.manager.backfill("mirror", most_owed=None))

    def heard(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            working.cancel()

    undo = before_each_statement(world.engine, heard)
    try:
        return (await working).finished
    except asyncio.CancelledError:
        return False
    finally:
        undo()


@pytest.mark.parametrize("words", STEPS.values(), ids=list(STEPS))
async def test_killed_in_a_page_it_goes_on_where_it_was(primary: AsyncEngine, words: str) -> None:
    """K4, D1: kill -9 after each step of the second page of one row; a page whose commit came counts, others do not."""
    world = World(primary)
    await world.prepare(4)
    killed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "tests.backfilling", dsn_of(primary), words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=50,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    done = 2 if words == STEPS["the page is committed"] else 1
    await eventually(lambda: alone(primary))
    assert sum((await recorded(primary)).values()) == done
    found = await world.manager.backfill("mirror", most_owed=None)
    assert (found.recorded, found.total, found.finished) == (4, 4, True)
    assert set((await recorded(primary)).values()) == {1}


async def alone(engine: AsyncEngine) -> bool:
    """Whether the server is done with who was killed."""
    sql = "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    return bool(await value(engine, sql + " and state <> 'idle'") == 0)


async def test_two_at_once_share_the_pages(primary: AsyncEngine) -> None:
    """K4: every row is recorded once, and both see the end."""
    world = World(primary)
    await world.prepare(60)
    async with running(world.manager.relay()):
        both = await asyncio.gather(*(world.manager.backfill("mirror", most_owed=4) for _ in range(2)))
    assert [(each.recorded, each.finished) for each in both] == [(60, True)] * 2
    assert set((await recorded(primary)).values()) == {1}


async def test_told_again_it_records_nothing_and_told_to_restart_everything(primary: AsyncEngine) -> None:
    """K4, R8."""
    world = World(primary)
    await world.prepare(5)
    planned = await world.manager.backfill("mirror", dry_run=True)
    assert (planned.left, planned.total, await pending(primary)) == (5, 5, 0)
    await world.manager.backfill("mirror", most_owed=None)
    await world.fill([6, 7])
    again = await world.manager.backfill("mirror", most_owed=None)
    assert (again.recorded, again.left, again.finished) == (5, 0, True)
    assert (await world.manager.backfill("mirror", dry_run=True)).left == 0
    assert (await world.manager.backfill("mirror", dry_run=True, restart=True)).left == 7
    anew = await world.manager.backfill("mirror", most_owed=None, restart=True)
    assert (anew.recorded, anew.total) == (7, 7)
    assert sum((await recorded(primary)).values()) == 12


async def test_no_transaction_is_open_while_it_waits_for_the_secondary(primary: AsyncEngine) -> None:
    """K5, K7: no more than it may is on its way, and it waits with no transaction and no snapshot."""
    secondary = ScriptedSecondary("mirror")
    world = World(primary, secondary, batch_size=2)
    await world.prepare(50)
    secondary.hang()
    waiting: list[str] = []
    async with running(world.manager.relay()):
        filling = asyncio.create_task(
            world.manager.backfill("mirror", most_owed=10, progress=lambda seen: waiting.append(seen.waiting or ""))
        )
        await eventually(lambda: any(word.startswith("the secondary") for word in waiting))
        assert await pending(primary) == 10
        # A turn of the relay is a transaction too, for a moment: only one that waits would be seen all the time.
        await eventually(lambda: none_open(primary))
        secondary.release()
        assert (await filling).finished
        await eventually(lambda: nothing_pending(primary))
    assert families(secondary) == await world.held()


async def none_open(engine: AsyncEngine) -> bool:
    assert await rows(engine, OPEN) == []
    return True


OPEN = """
select pid, query from pg_stat_activity
where datname = current_database() and pid <> pg_backend_pid() and state like 'idle in transaction%'
"""


async def test_a_locked_row_is_waited_for_by_one_short_transaction_after_another(primary: AsyncEngine) -> None:
    """K7: however long its locker takes, no transaction of ours grows old."""
    world = World(primary)
    await world.prepare(3)
    began: set[object] = set()
    async with primary.connect() as application:
        await application.exec_driver_sql("update patient set family = 'New' where number = 2")
        filling = asyncio.create_task(world.manager.backfill("mirror", most_owed=None))

        async def seen_again() -> bool:
            waiting = "select xact_start from pg_stat_activity where wait_event_type = 'Lock'"
            began.update(row["xact_start"] for row in await rows(primary, waiting))
            return len(began) >= 2

        await eventually(seen_again)
        await application.rollback()
    assert (await filling).finished


async def test_a_secondary_that_is_down_is_not_sent_more(primary: AsyncEngine) -> None:
    """K5: nothing piles up in holds while the breaker is open and probed."""
    secondary = ScriptedSecondary("mirror")
    world = World(primary, secondary, batch_size=2)
    await world.prepare(200)
    secondary.down = Unavailable("refused", "as the test says")
    waits: list[str | None] = []
    async with running(world.manager.relay()):
        filling = asyncio.create_task(
            world.manager.backfill("mirror", most_owed=10, progress=lambda each: waits.append(each.waiting))
        )
        await eventually(lambda: opened(primary, 3))
        # By then what was in flight when it broke is held; from the second look on it knows that.
        waits.clear()
        await eventually(lambda: len(waits) > 2 and all(waits[-2:]))
        owed = await pending(primary)
        # What may be on its way, once more for what was in flight when it broke.
        assert owed <= 10 + world.manager.config.attempts_in_flight * 2
        opens = await value(primary, "select breaker_opens from outbox_secondary")
        await eventually(lambda: opened(primary, opens + 4))
        assert await pending(primary) == owed < 200
        secondary.down = None
        assert (await filling).finished
        await eventually(lambda: nothing_pending(primary))
    assert families(secondary) == await world.held()


async def opened(engine: AsyncEngine, times: int) -> bool:
    return bool(await value(engine, "select breaker_opens >= :times from outbox_secondary", times=times))


async def test_of_several_secondaries_only_the_one_is_owed(primary: AsyncEngine) -> None:
    """K3: with its terms: the tenants and types it wants and no others."""
    world = World(primary, MemorySecondary("mirror"), MemorySecondary("other"))
    await world.prepare(3)
    await world.fill([1, 2], "south")
    await execute(primary, "update outbox_secondary set tenant_ids = '{south}' where backend_id = 'mirror'")
    assert (await world.manager.backfill("mirror", most_owed=None)).recorded == 2
    assert (await world.manager.backfill("other", tenant_id="north", most_owed=None)).recorded == 3
    owed = await rows(primary, "select backend_id, count(*) from outbox_delivery group by 1 order by 1")
    assert [tuple(row.values()) for row in owed] == [("mirror", 2), ("other", 3)]
