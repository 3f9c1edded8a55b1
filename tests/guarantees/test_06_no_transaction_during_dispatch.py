"""Promise 6: while a secondary works, no transaction is open and no pooled connection is held."""

from __future__ import annotations

from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import Unavailable
from tests.relaying import change, manager_of, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

SESSIONS = """
select state, xact_start, backend_xmin, query from pg_stat_activity
where datname = current_database() and application_name = 'outbox relay'
"""


async def test_while_a_secondary_hangs_no_session_is_in_a_transaction(primary: AsyncEngine) -> None:
    """F2: every session of the relay stands idle, holding neither a transaction nor a snapshot."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=2, attempts_in_flight=4, poll_interval=60, prune_interval=3600)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(8)))
    secondary.hang()
    async with running(manager.relay()):
        await eventually(lambda: len(secondary.running) == 4)
        seen = await eventually(lambda: _all_idle(primary))
        assert len(seen) >= 2, "neither the pool nor the heartbeat's connection is there to look at"
        assert {session["backend_xmin"] for session in seen} == {None}
        assert len(secondary.running) == 4
        secondary.release()


async def _all_idle(primary: AsyncEngine) -> list[dict[str, Any]]:
    found = await rows(primary, SESSIONS)
    assert [session for session in found if session["state"] != "idle" or session["xact_start"]] == []
    return found


async def test_hanging_secondaries_leave_the_pool_to_the_others(primary: AsyncEngine) -> None:
    """F2, F11: more batches hang than the relay has connections; one that is well is served all the while."""
    hanging = [ScriptedSecondary(f"hanging-{number}") for number in range(3)]
    well = ScriptedSecondary("well")
    manager = manager_of(primary, *hanging, well, relay_connections=2, batch_size=1, attempts_in_flight=4, lease=1)
    await manager.register()
    await write(manager, *(change(str(number)) for number in range(6)))
    for secondary in hanging:
        secondary.hang()
    relay = manager.relay()
    async with running(relay):
        await eventually(lambda: all(len(secondary.running) == 4 for secondary in hanging))
        await eventually(lambda: len(well.held) == 6)
        for number in range(10):
            await write(manager, change("more", number))
            await eventually(lambda count=7 + number: len(well.sent) == count)
        # Their leases were kept for longer than one lease meanwhile.
        kept = "lease_until > started_at + interval '1.3 seconds'"
        older = f"select bool_and({kept}) from outbox_attempt where finished_at is null"
        await eventually(lambda: value(primary, older))
        assert all(len(secondary.running) == 4 for secondary in hanging)
        pool = relay._primary._pool
        assert pool is not None
        await eventually(lambda: pool.get_idle_size() == pool.get_size())
        for secondary in hanging:
            secondary.release()


async def test_a_secondary_that_hangs_refuses_or_raises_leaves_no_transaction_behind(primary: AsyncEngine) -> None:
    """F2: whatever the end of a dispatch was."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, lease=0.6, attempt_deadline=0.2, poll_interval=60, prune_interval=3600)
    await manager.register()
    relay = manager.relay()
    async with running(relay):
        for number, ending in enumerate((RuntimeError("no"), Unavailable("refused", ""), None)):
            secondary.always("1", ending) if ending else secondary.hang()
            await write(manager, change("1", number))
            await eventually(lambda count=number + 1: len(secondary.calls) >= count)
        await eventually(lambda: not secondary.running)
        await eventually(lambda: _all_idle(primary))
