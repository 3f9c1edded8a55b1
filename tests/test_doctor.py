"""Doctor: each thing that is known to go wrong is brought about, and found with what to do next."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool

from outbox import Registration, Rejected, SyncManager
from outbox.errors import Unavailable
from outbox.finding import Finding, Verdict
from outbox.migrate import migrate
from tests.relaying import change, execute, manager_of, own_server, raw, removal, running, value, write
from tests.scripted import CheckedSecondary, ScriptedSecondary
from tests.waiting import eventually


async def found(manager: SyncManager, name: str) -> Finding:
    """The worst finding of this name."""
    worst = (Verdict.WRONG, Verdict.WARNING, Verdict.UNKNOWN, Verdict.OK)
    findings = [each for each in await manager.diagnose() if each.name == name]
    return min(findings, key=lambda each: worst.index(each.verdict))


async def looked(engine: AsyncEngine, *secondaries: Any, **settings: Any) -> SyncManager:
    """A manager whose secondaries a relay has just carried to."""
    manager = manager_of(engine, *secondaries, **settings)
    await manager.register()
    await write(manager, change("one"))
    await manager.relay().drain()
    return manager


@pytest.fixture
async def manager(primary: AsyncEngine) -> AsyncIterator[SyncManager]:
    manager = await looked(primary, CheckedSecondary("search"))
    yield manager
    await manager.aclose()


async def test_nothing_is_wrong_with_a_server_as_it_comes() -> None:
    """N3, the other way round: a doctor that finds something everywhere is asked by nobody."""
    with own_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await looked(engine, CheckedSecondary("search"))
        findings = await manager.diagnose()
        assert [each for each in findings if each.verdict is not Verdict.OK] == []
        assert len({each.name for each in findings}) == len(findings) == 28
        await manager.aclose()
        await engine.dispose()


async def test_a_primary_that_is_away_is_the_only_finding() -> None:
    with own_server() as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
    manager = manager_of(engine, CheckedSecondary("search"))
    (finding,) = await manager.diagnose()
    assert (finding.name, finding.verdict) == ("primary", Verdict.WRONG)
    assert finding.advice


async def test_tables_that_are_missing_or_of_another_version(database: str) -> None:
    """S3."""
    engine = create_async_engine(database, poolclass=NullPool)
    manager = manager_of(engine, CheckedSecondary("search"))
    assert (await found(manager, "schema")).verdict is Verdict.WRONG
    assert "sequence" not in {each.name for each in await manager.diagnose()}
    await migrate(engine)
    assert (await found(manager, "schema")).verdict is Verdict.OK
    await execute(engine, "alter table outbox_secondary drop column doubted_at")
    finding = await found(manager, "schema")
    assert (finding.verdict, "outbox migrate" in finding.advice) == (Verdict.WRONG, True)
    await engine.dispose()


async def test_a_role_that_may_not_relay(primary: AsyncEngine, manager: SyncManager) -> None:
    name = f"reader_{primary.url.database}"
    await execute(primary, f"create role {name} login")
    await execute(primary, f"grant select on all tables in schema public to {name}")
    engine = create_async_engine(primary.url.set(username=name), poolclass=NullPool)
    reading = manager_of(engine, *manager.registrations)
    finding = await found(reading, "privileges")
    assert finding.verdict is Verdict.WRONG
    assert all(work in finding.found for work in ("claim (", "settle (", "prune (", "delete on outbox_delivery"))
    # What it may not see is unknown, and not well.
    assert (await found(reading, "sequence")).verdict is Verdict.UNKNOWN
    assert (await found(reading, "transactions")).verdict is Verdict.UNKNOWN
    assert (await found(manager, "privileges")).verdict is Verdict.OK
    await engine.dispose()
    await execute(primary, f"drop owned by {name}")
    await execute(primary, f"drop role {name}")


async def test_a_secondary_that_is_not_registered(primary: AsyncEngine, manager: SyncManager) -> None:
    """Pitfall 25: what is configured and never carried to is not green."""
    more = manager_of(primary, *manager.registrations, ScriptedSecondary("cache"))
    finding = await found(more, "registry")
    assert (finding.verdict, "cache" in finding.found) == (Verdict.WRONG, True)


async def test_a_secondary_that_is_registered_and_not_ours(primary: AsyncEngine, manager: SyncManager) -> None:
    await manager_of(primary, ScriptedSecondary("cache")).register()
    finding = await found(manager, "registry")
    assert (finding.verdict, "cache" in finding.found) == (Verdict.WARNING, True)
    await execute(primary, "update outbox_secondary set status = 'removed' where backend_id = 'cache'")
    assert (await found(manager, "registry")).verdict is Verdict.OK


async def test_terms_that_differ_from_the_registry(primary: AsyncEngine, manager: SyncManager) -> None:
    for terms in ({"ordering": "log"}, {"tenant_ids": ["acme"]}, {"resource_types": []}, {"role": "cache"}):
        other = manager_of(primary, Registration(ScriptedSecondary("search"), **terms))
        assert (await found(other, "registry")).verdict is Verdict.WARNING, terms
    assert (await found(manager, "registry")).verdict is Verdict.OK


async def test_without_a_manager_secondaries_are_unknown(primary: AsyncEngine, manager: SyncManager) -> None:
    bare = manager_of(primary)
    for name in ("registry", "reachable", "ahead"):
        finding = await found(bare, name)
        assert (finding.verdict, "--app" in finding.advice) == (Verdict.UNKNOWN, True)
    assert (await found(bare, "lag")).verdict is Verdict.OK


async def test_a_secondary_that_is_down(primary: AsyncEngine) -> None:
    """Content that an adapter's error quotes is not repeated."""
    down, odd, dumb = CheckedSecondary("down"), CheckedSecondary("odd"), ScriptedSecondary("dumb")
    down.unreachable, odd.unreachable = Unavailable("refused", "secret"), ValueError("secret")
    manager = await looked(primary, down, odd, dumb)
    findings = [each for each in await manager.diagnose() if each.name == "reachable"]
    assert [each.verdict for each in findings] == [Verdict.WRONG, Verdict.WRONG, Verdict.UNKNOWN]
    assert "(refused)" in findings[0].found
    assert not any("secret" in each.found for each in findings)


async def test_a_secondary_that_hangs_does_not_hang_the_doctor(primary: AsyncEngine) -> None:
    class Hanging(CheckedSecondary):
        hangs = False

        async def check(self) -> None:
            await self._hang_on()

        async def highest_position(self) -> int:
            await self._hang_on()
            return await super().highest_position()

        async def _hang_on(self) -> None:
            while self.hangs:
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    # It will not even be cancelled, but for the end of the test.
                    if not self.hangs:
                        raise

    secondary = Hanging("search")
    manager = await looked(primary, secondary, CheckedSecondary("other"), health_timeout=0.2)
    secondary.hangs = True
    before = asyncio.all_tasks()
    findings = {each.name: each for each in await manager.diagnose()}
    assert findings["reachable"].verdict is findings["ahead"].verdict is Verdict.UNKNOWN
    assert findings["lag"].verdict is findings["sequence"].verdict is Verdict.OK
    secondary.hangs = False
    left = asyncio.all_tasks() - before
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)


async def test_a_check_that_hangs_in_the_primary_is_unknown(primary: AsyncEngine) -> None:
    """A lock that somebody holds on a table is no reason to say nothing about the rest."""
    manager = await looked(primary, CheckedSecondary("search"), health_timeout=0.3)
    async with primary.begin() as holder:
        await holder.execute(text("lock table outbox_backfill in access exclusive mode"))
        findings = {each.name: each.verdict for each in await manager.diagnose()}
    assert (findings["backfill"], findings["lag"]) == (Verdict.UNKNOWN, Verdict.OK)


async def test_a_relay_that_does_not_look(primary: AsyncEngine, manager: SyncManager) -> None:
    await execute(primary, "update outbox_secondary set looked_at = now() - interval '1 hour'")
    assert (await found(manager, "relay")).verdict is Verdict.WRONG
    async with running(manager.relay()):
        await eventually(lambda: value(primary, "select looked_at > now() - interval '1 minute' from outbox_secondary"))
        assert (await found(manager, "relay")).verdict is Verdict.OK


async def test_an_open_breaker_and_failing_attempts(primary: AsyncEngine) -> None:
    secondary = ScriptedSecondary("search")
    manager = await looked(primary, secondary)
    secondary.down = Unavailable("refused", "nobody there")
    async with running(manager.relay()):
        await write(manager, change("two"))
        await eventually(lambda: value(primary, "select breaker = 'open' from outbox_secondary"))
        await execute(primary, "update outbox_secondary set breaker_until = now() + interval '1 hour'")
        assert (await found(manager, "breaker")).verdict is Verdict.WRONG
        assert (await found(manager, "attempts")).verdict is Verdict.WRONG


async def test_dead_keys(primary: AsyncEngine) -> None:
    secondary = ScriptedSecondary("search")
    manager = await looked(primary, secondary)
    secondary.always("bad", Rejected("invalid"))
    await write(manager, change("bad"))
    await manager.relay().drain()
    finding = await found(manager, "dead")
    assert (finding.verdict, "redrive" in finding.advice) == (Verdict.WRONG, True)
    await execute(primary, "update outbox_secondary set status = 'shadow'")
    assert (await found(manager, "dead")).verdict is Verdict.WARNING, "nobody relies on a shadow"


async def test_lag_and_pending_over_their_objectives(primary: AsyncEngine) -> None:
    manager = await looked(primary, ScriptedSecondary("search"), unhealthy_pending=1, unhealthy_lag=5)
    await write(manager, change("one"), change("two"))
    assert (await found(manager, "lag")).verdict is Verdict.OK
    await execute(primary, "update outbox set created_at = now() - interval '1 minute'")
    assert (await found(manager, "lag")).verdict is Verdict.WRONG
    assert (await found(manager, "pending")).verdict is Verdict.WRONG


async def test_a_paused_secondary(manager: SyncManager) -> None:
    await manager.pause("search")
    assert (await found(manager, "paused")).verdict is Verdict.WARNING


async def test_a_long_transaction_in_another_database(
    primary: AsyncEngine, manager: SyncManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D4, S11: the horizon is of the whole cluster. Nobody waits here for five minutes, so the limit is shorter."""
    monkeypatch.setattr("outbox.doctor_server._LONG", timedelta(0))
    engine = create_async_engine(primary.url.set(database="postgres"), poolclass=NullPool)
    async with engine.connect() as idle:
        await idle.execute(text("select 1"))
        finding = await found(manager, "transactions")
        assert (finding.verdict, "database postgres" in finding.found) == (Verdict.WARNING, True)
    await engine.dispose()


async def test_a_prepared_transaction_and_an_abandoned_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """A11, pitfall 21: both hold back vacuum, and neither shows in pg_stat_activity."""
    monkeypatch.setattr("outbox.doctor_server._LONG", timedelta(0))
    with own_server(max_prepared_transactions="1") as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await looked(engine, CheckedSecondary("search"))
        async with raw(engine) as connection:
            await connection.execute("begin; create table more ()")
            await connection.execute("prepare transaction 'left behind'")
        await execute(engine, "select pg_create_physical_replication_slot('gone', true)")
        assert (await found(manager, "prepared")).verdict is Verdict.WARNING
        finding = await found(manager, "slots")
        assert (finding.verdict, "gone" in finding.found) == (Verdict.WARNING, True)
        await manager.aclose()
        await engine.dispose()


async def test_autovacuum_switched_off_and_dead_rows(
    primary: AsyncEngine, manager: SyncManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S11, pitfall 21."""
    await execute(primary, "alter table outbox_delivery set (autovacuum_enabled = off)")
    finding = await found(manager, "vacuum")
    assert (finding.verdict, "outbox_delivery" in finding.found) == (Verdict.WARNING, True)
    await execute(primary, "alter table outbox_delivery reset (autovacuum_enabled)")
    assert (await found(manager, "vacuum")).verdict is Verdict.OK
    monkeypatch.setattr("outbox.doctor_tables._MANY_DEAD", 100)
    await execute(
        primary,
        "insert into outbox_delivery (backend_id, lane, event_id, key_hash) "
        "select 'search', 0, n, n from generate_series(1000, 2000) as n",
    )
    await execute(primary, "delete from outbox_delivery")
    await eventually(lambda: dirty(manager))


async def dirty(manager: SyncManager) -> bool:
    finding = await found(manager, "vacuum")
    return finding.verdict is Verdict.WARNING and "outbox_delivery has" in finding.found


async def test_commits_that_a_crash_may_undo(primary: AsyncEngine, manager: SyncManager) -> None:
    """A8."""
    await execute(primary, f'alter database "{primary.url.database}" set synchronous_commit = off')
    engine = create_async_engine(primary.url, poolclass=NullPool)
    finding = await found(manager_of(engine, *manager.registrations), "durability")
    assert (finding.verdict, "synchronous_commit" in finding.found) == (Verdict.WARNING, True)
    await engine.dispose()


async def test_connections_that_run_out() -> None:
    """S2, pitfall 24."""
    with own_server(max_connections="12", superuser_reserved_connections="2") as server:
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        manager = await looked(engine, CheckedSecondary("search"), relay_connections=2)
        assert (await found(manager, "connections")).verdict is Verdict.OK
        async with AsyncExitStack() as open_ones:
            for _ in range(7):  # with the one that asks, two of ten are left
                await open_ones.enter_async_context(raw(engine))
            assert (await found(manager, "connections")).verdict is Verdict.WARNING
        await manager.aclose()
        await engine.dispose()


async def test_an_unlogged_table(primary: AsyncEngine, manager: SyncManager) -> None:
    """A9: a crash would empty it."""
    await execute(primary, "alter table outbox_hold set unlogged")
    finding = await found(manager, "persistence")
    assert (finding.verdict, "outbox_hold" in finding.found) == (Verdict.WRONG, True)


async def test_disabled_triggers_and_a_session_that_acts_as_a_copy(primary: AsyncEngine, manager: SyncManager) -> None:
    await execute(primary, "create function noted() returns trigger language plpgsql as $$ begin return new; end $$")
    await execute(primary, "create trigger noted before insert on outbox for each row execute function noted()")
    assert (await found(manager, "triggers")).verdict is Verdict.OK
    await execute(primary, "alter table outbox disable trigger noted")
    finding = await found(manager, "triggers")
    assert (finding.verdict, "outbox.noted" in finding.found) == (Verdict.WARNING, True)
    await execute(primary, f"alter database \"{primary.url.database}\" set session_replication_role = 'replica'")
    engine = create_async_engine(primary.url, poolclass=NullPool)
    finding = await found(manager_of(engine, *manager.registrations), "triggers")
    assert (finding.verdict, "session_replication_role" in finding.found) == (Verdict.WARNING, True)
    await engine.dispose()


async def test_a_sequence_that_was_set_back(primary: AsyncEngine, manager: SyncManager) -> None:
    """S5: the next insert would fail, or worse, not fail."""
    await write(manager, change("two"), removal("three"))
    await execute(primary, "select setval('outbox_event_id_seq', 1)")
    assert (await found(manager, "sequence")).verdict is Verdict.WRONG
    await manager.move_past()
    assert (await found(manager, "sequence")).verdict is Verdict.OK
    await write(manager, change("four"))


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "kept"])
async def test_a_sequence_of_attempts_that_was_set_back(
    primary: AsyncEngine, manager: SyncManager, folded: bool
) -> None:
    """S5: what is opened with a number that was counted before is seen by nobody."""
    await execute(primary, "update outbox_secondary set folded_through = (select max(attempt_id) from outbox_attempt)")
    highest = await value(primary, "select folded_through from outbox_secondary")
    gone = "delete from outbox_attempt" if folded else "update outbox_secondary set folded_through = 0"
    await execute(primary, gone)
    assert (await found(manager, "sequence")).verdict is Verdict.OK
    await execute(primary, "alter sequence outbox_attempt_attempt_id_seq restart")
    finding = await found(manager, "sequence")
    assert (finding.verdict, f"attempt {highest}" in finding.found) == (Verdict.WRONG, True)
    await execute(primary, finding.advice)
    assert (await found(manager, "sequence")).verdict is Verdict.OK


async def test_a_sequence_that_gives_positions_to_sessions_in_advance(
    primary: AsyncEngine, manager: SyncManager
) -> None:
    """Floors and rest would pass positions that are still to come."""
    await execute(primary, "alter sequence outbox_event_id_seq cache 32")
    finding = await found(manager, "sequence")
    assert (finding.verdict, "32" in finding.found) == (Verdict.WRONG, True)
    assert "alter sequence public.outbox_event_id_seq cache 1" in finding.advice
    assert "reconcile every secondary" in finding.advice
    await execute(primary, "alter sequence outbox_event_id_seq cache 1")
    assert (await found(manager, "sequence")).verdict is Verdict.OK


async def test_a_backfill_that_stands_still(primary: AsyncEngine, manager: SyncManager) -> None:
    """K4, R8."""
    insert = "insert into outbox_backfill (backend_id, tenant_id, resource_type) values ('search', 'a', 'b')"
    await execute(primary, insert)
    assert (await found(manager, "backfill")).verdict is Verdict.OK
    await execute(primary, "update outbox_backfill set advanced_at = now() - interval '1 day'")
    finding = await found(manager, "backfill")
    assert (finding.verdict, "search" in finding.found) == (Verdict.WARNING, True)
    await execute(primary, "update outbox_backfill set finished_at = now()")
    assert (await found(manager, "backfill")).verdict is Verdict.OK


async def test_a_secondary_that_is_ahead(primary: AsyncEngine, manager: SyncManager) -> None:
    """C4: found without a relay, and without writing anything."""
    await execute(primary, "truncate outbox")
    await execute(primary, "select setval('outbox_event_id_seq', 1, false)")
    finding = await found(manager, "ahead")
    assert (finding.verdict, "--repair" in finding.advice) == (Verdict.WRONG, True)
    assert await value(primary, "select count(*) from outbox_secondary where beyond is not null") == 0
    await manager.move_past()
    assert (await found(manager, "ahead")).verdict is Verdict.OK
    assert (await found(manager, "history")).verdict is Verdict.WARNING
