"""The failure lab: it catches each kind of faulty secondary, names what differs, and ours all pass it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from msgspec.structs import replace
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.sqlite_storage import SqliteStorage
from outbox import MemorySecondary, SyncEvent
from outbox.errors import SettingsError, Unavailable
from outbox.secondaries.base import Applied, Outcome, Rejected, Secondary, Stale
from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.sql import SqlSecondary
from outbox.secondaries.storage import ResourceStorageSecondary
from outbox.secondaries.valkey import ValkeySecondary
from outbox.testing.lab import Diverged, FailureLab
from outbox.testing.lab_ground import STEPS, TYPE
from outbox.testing.lab_scenarios import SCENARIOS
from outbox.testing.servers import ValkeyServer

pytestmark = pytest.mark.timeout(600)  # twenty scenarios; not a bound of anything

Read = Callable[[str, str, str], Any]


@pytest.fixture
def lab(primary: AsyncEngine) -> FailureLab:
    return FailureLab(primary)


class NoGuard(MemorySecondary):
    """Takes whatever comes last."""

    def _keep(self, event: SyncEvent) -> Outcome:
        self.held[event.key] = event
        return Applied()


class ForgetsDeletes(MemorySecondary):
    """Guards what is there, and remembers nothing of what was deleted."""

    def _keep(self, event: SyncEvent) -> Outcome:
        outcome = super()._keep(event)
        if event.content is None and isinstance(outcome, Applied):
            del self.held[event.key]
        return outcome


class NotIdempotent(MemorySecondary):
    """Refuses for good what it has already, as an insert without an upsert does."""

    def _keep(self, event: SyncEvent) -> Outcome:
        outcome = super()._keep(event)
        return Rejected("duplicate_key") if isinstance(outcome, Stale) else outcome


class SwallowsErrors(MemorySecondary):
    """Answers that all is well whatever its server says."""

    down = False

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        try:
            return await self._call(batch)
        except ConnectionError:
            return [Applied()] * len(batch)

    async def _call(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        if self.down:
            raise ConnectionError
        return await super().apply(batch)

    @asynccontextmanager
    async def away(self) -> AsyncIterator[None]:
        self.down = True
        yield
        self.down = False


class AppliedForFailed(MemorySecondary):
    """Does not hold what it answers for: one kind of event is lost on the way."""

    def _keep(self, event: SyncEvent) -> Outcome:
        return Applied() if event.operation == "update" else super()._keep(event)


class KeepsDeleted(MemorySecondary):
    """Answers a delete and keeps what was there."""

    def _keep(self, event: SyncEvent) -> Outcome:
        return Applied() if event.content is None else super()._keep(event)


class AltersContent(MemorySecondary):
    """Holds another number than it was given: all of its numbers are doubles."""

    def _keep(self, event: SyncEvent) -> Outcome:
        told = None if event.content is None else json.dumps(json.loads(event.content, parse_int=float))
        return super()._keep(replace(event, content=told))


class SwallowsCancellation(MemorySecondary):
    """Says that it holds what it was stopped from writing."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        try:
            await asyncio.sleep(0.05)
        except asyncio.CancelledError:
            return [Applied()] * len(batch)
        return await super().apply(batch)


class TakesHalfABatch(MemorySecondary):
    """Guards a batch by its first event: when that is stale, so is the rest."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        outcomes: list[Outcome] = []
        for event in batch:
            outcomes.append(Stale() if outcomes and isinstance(outcomes[0], Stale) else self._keep(event))
        return outcomes


class NeverThere(MemorySecondary):
    """Is never available."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        raise Unavailable("refused", "nobody is at home")


CAUGHT = [
    (NoGuard, {"newest first", "shuffled", "lease lost while applying", "woken too late"}),
    (ForgetsDeletes, {"newest first", "shuffled", "woken too late"}),
    (NotIdempotent, {"crash half way through", "crash before settle", "crash while settling", "answer lost"}),
    (SwallowsCancellation, {"cut off"}),
    (TakesHalfABatch, {"crash half way through"}),
    (AppliedForFailed, {"no fault"}),
    (KeepsDeleted, {"no fault"}),
    (AltersContent, {"no fault"}),
]


@pytest.mark.parametrize(("faulty", "scenarios"), CAUGHT, ids=[faulty.__name__ for faulty, _ in CAUGHT])
async def test_each_kind_of_faulty_secondary_is_caught(
    lab: FailureLab, faulty: Callable[[str], Secondary], scenarios: set[str]
) -> None:
    with pytest.raises(Diverged) as caught:
        await lab.check(faulty("index"), only=scenarios)
    assert {each.scenario for each in caught.value.differences} == scenarios


async def test_what_swallows_an_outage_is_caught_when_its_server_is_really_away(lab: FailureLab) -> None:
    swallowing = SwallowsErrors("index")
    with pytest.raises(Diverged) as caught:
        await lab.check(swallowing, away=swallowing.away, only={"no fault", "raises", "server away"})
    assert {each.scenario for each in caught.value.differences} == {"server away"}


async def test_what_is_never_there_ends_the_check_after_its_first_scenario(primary: AsyncEngine) -> None:
    lab = FailureLab(primary, within=timedelta(seconds=0.5))
    with pytest.raises(
        Diverged, match=r"1 of 1 scenarios failed\n  no fault: index: expected everything done"
    ) as caught:
        await lab.check(NeverThere("index"))
    assert "last error refused" in caught.value.differences[0].found


async def test_the_report_names_scenario_key_and_positions_and_no_content(lab: FailureLab) -> None:
    with pytest.raises(Diverged) as caught:
        await lab.check(ForgetsDeletes("index"), only={"newest first"})
    difference = next(each for each in caught.value.differences if each.scenario == "newest first")
    assert difference.key.startswith("newest-first-")
    assert difference.key.split("/")[1:] == [TYPE, "a"]
    assert difference.expected == "nothing"
    assert difference.found.startswith("position ")
    assert str(difference) in str(caught.value)
    assert "step" not in str(caught.value)


async def test_a_failing_check_says_how_much_more_there_is(lab: FailureLab) -> None:
    with pytest.raises(Diverged) as caught:
        await lab.check(NoGuard("index"), only={"newest first", "shuffled", "woken too late"})
    assert str(caught.value).endswith(f"and {len(caught.value.differences) - 20} more")


async def test_every_scenario_ran(lab: FailureLab) -> None:
    ran = await lab.check(MemorySecondary("index"))
    assert ran == [each.__name__.replace("_", " ") for each in SCENARIOS]
    assert len(set(ran)) == len(ran) >= 19


class Unlistable(NoGuard):
    """Has no listing that would show anything."""

    find = None

    async def scan(self, tenant_id: str, resource_type: str, after: str | None = None) -> AsyncIterator[Any]:
        raise NotImplementedError
        yield


@pytest.mark.parametrize("decoded", [False, True])
async def test_a_secondary_without_a_listing_is_compared_by_reading(lab: FailureLab, decoded: bool) -> None:
    class Guarded(Unlistable):
        _keep = MemorySecondary._keep

    def reading(secondary: MemorySecondary) -> Read:
        async def read(tenant_id: str, resource_type: str, resource_id: str) -> Any:
            event = secondary.held.get((tenant_id, resource_type, resource_id))
            return None if event is None else event.decoded() if decoded else event.content

        return read

    good, bad = Guarded("index"), Unlistable("index")
    only = {"no fault", "newest first"}
    assert await lab.check(good, read=reading(good), only=only)
    with pytest.raises(Diverged, match=r"expected nothing, found another content by read"):
        await lab.check(bad, read=reading(bad), only=only)


async def test_the_same_secondary_can_be_checked_again(lab: FailureLab) -> None:
    secondary, only = MemorySecondary("index"), ["no fault", "shuffled"]
    assert await lab.check(secondary, only=only) == await lab.check(secondary, only=only) == only
    assert len({key[0] for key in secondary.held}) == 4


async def test_a_scenario_that_there_is_not_is_refused(lab: FailureLab) -> None:
    with pytest.raises(SettingsError, match="no scenario is called 'bad luck'; there are answer lost, "):
        await lab.check(MemorySecondary("index"), only={"bad luck"})


def test_the_history_has_every_kind_of_change() -> None:
    """Created, changed, deleted, created again, deleted after a change, and created only."""
    told = {name: "".join("w" * (name in w) + "d" * (name in d) for w, d in STEPS) for name in "abcde"}
    assert told == {"a": "wwd", "b": "wdw", "c": "ww", "d": "wd", "e": "w"}


async def test_sqlite_converges(lab: FailureLab, tmp_path: Path) -> None:
    secondary = SqlSecondary("copy", f"sqlite+aiosqlite:///{tmp_path}/copy.db")
    assert await lab.check(secondary)
    await secondary.aclose()


async def test_postgres_converges(lab: FailureLab, database: str) -> None:
    secondary = SqlSecondary("copy", database)
    assert await lab.check(secondary)
    await secondary.aclose()


async def test_mariadb_converges(lab: FailureLab, mariadb_url: str) -> None:
    secondary = SqlSecondary("copy", mariadb_url, table := f"copy_{uuid4().hex}")
    assert await lab.check(secondary)
    await secondary.aclose()
    engine = create_async_engine(mariadb_url)
    async with engine.begin() as connection:
        await connection.execute(text(f"drop table {table}"))
    await engine.dispose()


async def test_opensearch_converges(lab: FailureLab, opensearch_url: str) -> None:
    secondary = OpenSearchSecondary("search", opensearch_url, prefix=f"t{uuid4().hex[:12]}")
    assert await lab.check(secondary)
    await secondary.aclose()


async def test_a_resource_storage_converges(lab: FailureLab, tmp_path: Path) -> None:
    async with SqliteStorage.open(tmp_path / "notes.db") as storage:
        assert await lab.check(ResourceStorageSecondary(storage, "notes"))


@pytest.fixture
def valkey() -> Iterator[ValkeyServer]:
    with ValkeyServer(appendonly=True) as server:
        yield server


async def test_valkey_converges_also_when_its_server_was_killed(lab: FailureLab, valkey: ValkeyServer) -> None:
    @asynccontextmanager
    async def away() -> AsyncIterator[None]:
        valkey.kill()
        yield
        valkey.start()

    secondary = ValkeySecondary("cache", valkey.url, uuid4().hex)
    assert (await lab.check(secondary, away=away))[-1] == "server away"
    await secondary.aclose()
