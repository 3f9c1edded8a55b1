"""Metrics (D48, D69, N4): what Prometheus reads is what the tables say, in as many series as before."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import Registration, SyncEvent, SyncManager, Unavailable, Which
from outbox.errors import SettingsError
from outbox.metrics import CONTENT_TYPE, exposition
from outbox.secondaries.base import Rejected, Retry, Stale
from tests.relaying import change, claim_by_hand, dsn_of, execute, manager_of, rows, running, value, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

PAGE = Path(__file__).parent.parent / "docs/operating.md"
SECRET = "Chalmers-7391"

# Every number afresh from the rows: no attempt is old enough to be pruned, so nothing need be taken from the totals.
COUNTED = """
select secondary.backend_id,
    (select count(*) from outbox_delivery as each where each.backend_id = secondary.backend_id)
        + (select coalesce(sum(cardinality(event_ids)), 0) from outbox_hold as each
           where each.backend_id = secondary.backend_id)
        + (select coalesce(sum(cardinality(event_ids)), 0) from outbox_attempt as each
           where each.backend_id = secondary.backend_id and finished_at is null) as pending,
    (select coalesce(sum(cardinality(event_ids)), 0) from outbox_attempt as each
     where each.backend_id = secondary.backend_id and finished_at is null) as in_flight,
    (select count(*) from outbox_hold as each where each.backend_id = secondary.backend_id and state = 'retrying')
        as failing_keys,
    (select count(*) from outbox_hold as each where each.backend_id = secondary.backend_id and state = 'dead')
        as dead_keys,
    (select coalesce(sum(events), 0) from outbox_discarded as each where each.backend_id = secondary.backend_id)
        as discarded,
    (select extract(epoch from max(finished_at)) from outbox_attempt as each
     where each.backend_id = secondary.backend_id and applied + stale > 0) as last_success,
    coalesce(sum(applied), 0) as applied, coalesce(sum(stale), 0) as stale, coalesce(sum(superseded), 0) as superseded,
    coalesce(sum(retried), 0) as retried, coalesce(sum(rejected), 0) as rejected, coalesce(sum(lost), 0) as lost
from (select backend_id from outbox_secondary) as secondary
left join (
    select backend_id, applied, stale, superseded, retried, rejected, lost from outbox_attempt
) as attempt on attempt.backend_id = secondary.backend_id
group by secondary.backend_id
order by secondary.backend_id
"""
OUTCOMES = ("applied", "stale", "superseded", "retried", "rejected", "lost", "discarded")
COUNTS = ("pending", "in_flight", "failing_keys", "dead_keys")
AGES = {"outbox_lag_seconds", "outbox_silence_seconds"}

Series = dict[tuple[str, ...], float]


def read(exposed: bytes) -> Series:
    """Every sample by its name and the values of its labels, as the client's own parser reads them."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(exposed.decode())
        for sample in family.samples
    }


def counted(row: dict[str, Any]) -> Series:
    """What the tables say, as the samples that must be there."""
    name = row["backend_id"]
    found = {(f"outbox_{each}", name): float(row[each]) for each in COUNTS}
    found |= {("outbox_deliveries_total", name, each): float(row[each]) for each in OUTCOMES}
    if row["last_success"] is not None:
        found["outbox_last_success_timestamp_seconds", name] = pytest.approx(float(row["last_success"]))
    return found


async def assert_as_counted(manager: SyncManager) -> Series:
    said = read(await manager.metrics())
    tables = await rows(manager.engine, COUNTED)
    expected = {name: number for row in tables for name, number in counted(row).items()}
    judged = ("outbox_healthy", "outbox_status", "outbox_breaker")
    assert {name: said[name] for name in said if name[0] not in AGES and name[0] not in judged} == expected
    return said


async def test_metrics_say_what_the_tables_say_after_a_mixed_history(primary: AsyncEngine) -> None:
    """N4: every way a delivery can end, and one of each that has not ended, on two secondaries of either order."""
    search, archive = ScriptedSecondary("search"), ScriptedSecondary("archive")
    manager = manager_of(primary, search, Registration(archive, ordering="log"), retry_initial=600, retry_max=600)
    await manager.register()
    assert (await assert_as_counted(manager))["outbox_pending", "search"] == 0
    search.script("again", Retry("busy"))
    search.script("stale", Stale())
    for name in ("dead", "given-up"):
        search.always(name, Rejected("malformed"))
    search.always("failing", Retry("busy"))
    archive.always("dead", Rejected("forbidden"))
    names = ("again", "stale", "dead", "given-up", "failing", "fine")
    await write(manager, *(change(name, number) for name in names for number in range(2)))
    assert await claim_by_hand(primary, "search"), "whoever claims and is never heard of again loses what he has"
    for _ in range(3):
        # What was lost, then what failed once, each by hand instead of after ten minutes.
        await manager.relay().drain()
        await assert_as_counted(manager)
        await manager.redrive()
    await manager.relay().drain()
    assert await manager.discard(Which(resource_id="given-up"), reason="never mind") == 1

    said = await assert_as_counted(manager)
    ended = {key[1:]: number for key, number in said.items() if key[0] == "outbox_deliveries_total"}
    assert all(ended["search", outcome] for outcome in OUTCOMES), "the history leaves something out"
    assert (said["outbox_dead_keys", "search"], said["outbox_failing_keys", "search"]) == (1, 1)
    assert (said["outbox_healthy", "search"], said["outbox_healthy", "archive"]) == (0, 0)
    assert read(await SyncManager(primary).metrics()).keys() == said.keys()


async def settled_down(primary: AsyncEngine) -> bool:
    """Whether nothing is due any more: what is owed is dead."""
    return await value(
        primary,
        """select not exists (select from outbox_delivery)
              and not exists (select from outbox_attempt where finished_at is null)
              and not exists (select from outbox_hold where state <> 'dead')""",
    )


async def test_what_is_in_hand_is_counted_as_in_flight(primary: AsyncEngine) -> None:
    """N4, while something is out."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    secondary.hang()
    await write(manager, *(change(str(number)) for number in range(3)))
    async with running(manager.relay()):
        await eventually(lambda: secondary.running)
        said = await assert_as_counted(manager)
        assert (said["outbox_in_flight", "search"], said["outbox_pending", "search"]) == (3, 3)
        assert said["outbox_lag_seconds", "search"] > 0
        secondary.release()
    await eventually(lambda: value(primary, "select count(*) = 0 from outbox_attempt where finished_at is null"))
    said = await assert_as_counted(manager)
    assert (said["outbox_lag_seconds", "search"], said["outbox_healthy", "search"]) == (0, 1)


async def test_a_write_that_failed_on_every_secondary_is_counted_on_every_one(primary: AsyncEngine) -> None:
    """D48: the commit stands and the call was fine; that nobody has it is a number to alarm on."""
    secondaries = [ScriptedSecondary("search"), ScriptedSecondary("archive")]
    manager = manager_of(primary, *secondaries)
    await manager.register()
    for each in secondaries:
        each.always("1", Rejected("malformed"))
    await manager.sync(change("1"))
    await manager.relay().drain()
    said = await assert_as_counted(manager)
    for name in ("search", "archive"):
        assert said["outbox_deliveries_total", name, "rejected"] == 1
        assert (said["outbox_dead_keys", name], said["outbox_healthy", name]) == (1, 0)


async def test_states_are_one_series_each_of_which_one_is_1(primary: AsyncEngine) -> None:
    """D69: the breaker, and whether anything is expected of a secondary at all."""
    secondary = ScriptedSecondary("search")
    secondary.down = Unavailable("refused", SECRET)
    manager = manager_of(primary, secondary, breaker_threshold=1, breaker_initial=600, breaker_max=600)
    await manager.register()
    await write(manager, change("1"))
    await manager.relay().run_once("search")
    said = read(await manager.metrics())
    assert states_of(said, "outbox_breaker") == {"closed": 0, "open": 1, "half_open": 0}
    assert states_of(said, "outbox_status") == dict.fromkeys(("shadow", "draining", "paused", "removed"), 0) | {
        "live": 1
    }
    await manager.pause("search")
    assert states_of(read(await manager.metrics()), "outbox_status")["paused"] == 1


@pytest.mark.parametrize("constraint", ["status", "breaker"])
async def test_every_state_that_the_tables_allow_has_its_series(primary: AsyncEngine, constraint: str) -> None:
    """D69: or a state that comes later would be none of those there are."""
    await manager_of(primary, ScriptedSecondary("search")).register()
    allowed = await value(
        primary,
        "select pg_get_constraintdef(oid) from pg_constraint where conname = :name",
        name=f"outbox_secondary_{constraint}_known",
    )
    states = set(re.findall("'([a-z_]+)'", allowed))
    for state in sorted(states):
        await execute(primary, f"update outbox_secondary set {constraint} = :state", state=state)
        said = states_of(read(await SyncManager(primary).metrics()), f"outbox_{constraint}")
        assert said == dict.fromkeys(states, 0) | {state: 1}


def states_of(said: Series, name: str) -> dict[str, float]:
    return {key[2]: number for key, number in said.items() if key[0] == name}


async def test_nothing_that_is_written_makes_a_series_more(primary: AsyncEngine) -> None:
    """N4, D69: a thousand tenants, types, ids and error codes; no label says any of them."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary, batch_size=500)
    await manager.register()
    await manager.sync(change("1"))
    await manager.relay().drain()
    before = read(await manager.metrics())
    for number in range(1_000):
        secondary.always(f"{SECRET}-{number}", Rejected(f"{SECRET}-{number}"))
    names = [f"{SECRET}-{number}" for number in range(1_000)]
    await write(manager, *(SyncEvent.create(name, name, {name: name}, tenant_id=name) for name in names))
    await manager.relay().drain()
    exposed = await manager.metrics()
    after = read(exposed)
    assert after["outbox_dead_keys", "search"] == 1_000
    assert after.keys() == before.keys()
    assert SECRET not in exposed.decode()
    assert len(after) < 30


async def test_totals_never_go_backwards_over_folds_prunes_and_restarts(primary: AsyncEngine) -> None:
    """N4: a rate of theirs would be wrong; each look is by another manager, as after a restart."""
    secondary = ScriptedSecondary("search")
    tiny = {"keep_events": 0.001, "keep_attempts": 0.001, "prune_interval": 0.02, "batch_size": 3}
    manager = manager_of(primary, secondary, **tiny)
    await manager.register()
    secondary.script("2", Retry("busy"), None)
    secondary.script("3", Rejected("malformed"))
    secondary.always("given-up", Rejected("malformed"))
    await write(manager, change("given-up"))
    await manager.relay().drain()
    assert await manager.discard(Which(), reason="never mind") == 1
    seen = [read(await manager.metrics())]

    async def grown(until: Callable[[], Awaitable[bool]]) -> bool:
        done = await until()
        seen.append(read(await SyncManager(primary).metrics()))
        assert_not_less(*seen[-2:])
        return done

    async with running(manager.relay()):
        for round_ in range(3):
            await write(manager, *(change(str(number), round_) for number in range(30)))
            await eventually(lambda: grown(lambda: settled_down(primary)))
            await eventually(lambda: grown(lambda: value(primary, "select count(*) = 0 from outbox_attempt")))
    # The one that was refused was superseded in the second round.
    ended = {key[2]: number for key, number in seen[-1].items() if key[0] == "outbox_deliveries_total"}
    assert ended["applied"] + ended["superseded"] == 90
    assert (ended["retried"], ended["rejected"], ended["discarded"]) == (1, 2, 1)


def assert_not_less(before: Series, after: Series) -> None:
    totals = [key for key in before if key[0].endswith("_total")]
    assert len(totals) == len(OUTCOMES)
    assert [key for key in totals if after[key] < before[key]] == []


def test_none_that_is_registered_gives_families_without_samples() -> None:
    families = list(text_string_to_metric_families(exposition([]).decode()))
    assert families
    assert all(each.documentation and not each.samples for each in families)
    assert CONTENT_TYPE.startswith("text/plain; version=0.0.4")


def test_the_page_on_operating_names_every_metric_and_no_other() -> None:
    """D69: the table, and the rules somebody will copy."""
    families = text_string_to_metric_families(exposition([]).decode())
    # The parser calls a counter by its name without the ending.
    exposed = {each.name + "_total" * (each.type == "counter") for each in families}
    section = PAGE.read_text(encoding="utf-8").partition("## Metrics")[2].partition("\n## ")[0]
    table = set(re.findall(r"^\| `(outbox_\w+)", section, re.MULTILINE))
    rules = set(re.findall(r"\boutbox_\w+", "".join(re.findall("```yaml\n(.*?)```", section, re.DOTALL))))
    assert table == exposed
    assert rules
    assert rules <= exposed


BLOCKED = """
import sys
import outbox
from outbox.cli import main
from outbox.metrics import exposition

assert not any(name.startswith("prometheus_client") for name in sys.modules), "imported by whoever asks for no metrics"

class Blocked:
    def find_spec(self, name, path=None, of=None):
        if name.partition(".")[0] == "prometheus_client":
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Blocked())
sys.argv[0] = "outbox"
main()
"""


def command(*arguments: str, engine: AsyncEngine) -> subprocess.CompletedProcess[str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=ours | {"OUTBOX_DSN": dsn_of(engine)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


async def test_the_command_prints_what_prometheus_reads(primary: AsyncEngine) -> None:
    """D69: also when a secondary is unhealthy, which is for a rule to say and not for the exit status."""
    secondary = ScriptedSecondary("search")
    manager = manager_of(primary, secondary)
    await manager.register()
    secondary.always("1", Rejected("malformed", SECRET))
    await write(manager, change("1"), change("2"))
    await manager.relay().drain()
    done = command("-m", "outbox.cli", "metrics", engine=primary)
    assert (done.returncode, done.stderr) == (0, "")
    assert without_ages(read(done.stdout.encode())) == without_ages(read(await manager.metrics()))
    assert done.stdout.endswith("\n")
    assert not done.stdout.endswith("\n\n")


def without_ages(said: Series) -> Series:
    return {key: number for key, number in said.items() if key[0] not in AGES}


async def test_without_the_extra_it_says_what_to_install(primary: AsyncEngine) -> None:
    """D69: and whatever asks for no metrics works, and has not waited for the import."""
    done = command("-c", BLOCKED, "metrics", engine=primary)
    assert done.returncode == 2, done.stderr
    assert "pip install 'outbox-sync[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert command("-c", BLOCKED, "status", engine=primary).returncode == 1, "none is registered"


async def test_without_the_extra_the_manager_says_what_to_install(
    primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(SettingsError, match=r"pip install 'outbox-sync\[metrics\]'"):
        await SyncManager(primary).metrics()
