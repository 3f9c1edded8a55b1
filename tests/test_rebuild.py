"""Rebuild: a search index is filled beside the one that is searched, and takes its place at one moment (D7)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import MemorySecondary, SettingsError, SyncEvent, SyncManager, Unavailable, UnknownSecondary
from outbox.secondaries.base import Applied, Outcome
from outbox.secondaries.opensearch import OpenSearchSecondary
from outbox.secondaries.opensearch_documents import is_behind
from outbox.secondaries.opensearch_fresh import FreshSearch
from outbox.secondaries.opensearch_generations import Generation
from outbox.turn import take_turn
from tests.relaying import claim_by_hand, manager_of, pending, raw, rows, running
from tests.waiting import eventually

# What the new one is still owed of all that the old one has.
BEHIND = """
with owed as (
    select backend_id, event_id from outbox_delivery
    union all
    select backend_id, unnest(event_ids) from outbox_attempt where finished_at is null
    union all
    select backend_id, unnest(event_ids) from outbox_hold
)
select event_id from owed where backend_id = 'search-next'
except
select event_id from owed where backend_id = 'search'
"""


class Base(DeclarativeBase): ...


class Ward(Base):
    __tablename__ = "ward"
    number: Mapped[str] = mapped_column(primary_key=True)
    beds: Mapped[int]


class Server:
    """The search server as a reader and as an operator see it."""

    def __init__(self, url: str, prefix: str, session: aiohttp.ClientSession) -> None:
        self.url, self.prefix, self._session = url, prefix, session

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        async with self._session.request(method, f"{self.url}/{path}", json=body) as answer:
            return await answer.json()

    async def found(self, *, refresh: bool = True) -> dict[str, int]:
        """What a search of all wards shows."""
        name = f"{self.prefix}-ward"
        if refresh:
            await self.ask("POST", f"{name}/_refresh")
        answer = await self.ask("POST", f"{name}/_search", {"size": 5_000, "track_total_hits": True})
        return {each["_source"]["resource_id"]: each["_source"]["content"]["beds"] for each in answer["hits"]["hits"]}

    async def indices(self) -> dict[str, set[str]]:
        """Every index of ours with its aliases."""
        answer = await self.ask("GET", "all.*/_alias")
        return {name: set(each["aliases"]) for name, each in answer.items() if f"{self.prefix}-" in name}


@pytest.fixture
async def server(opensearch_url: str) -> AsyncIterator[Server]:
    async with aiohttp.ClientSession() as session:
        yield Server(opensearch_url, f"t{uuid4().hex[:12]}", session)


def manager_on(engine: AsyncEngine, server: Server, **options: Any) -> SyncManager:
    manager = manager_of(engine, OpenSearchSecondary("search", server.url, prefix=server.prefix, **options))
    manager.track(Ward, resource_id=Ward.number)
    return manager


@pytest.fixture
async def manager(primary: AsyncEngine, server: Server) -> AsyncIterator[SyncManager]:
    """Three hundred wards, in the primary and in the index."""
    async with primary.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    manager = manager_on(primary, server)
    await manager.register()
    await build(manager, range(300))
    await manager.relay().drain()
    yield manager
    await manager.aclose()


async def build(manager: SyncManager, numbers: range) -> None:
    async with manager.session() as session, session.begin():
        session.add_all(Ward(number=str(number), beds=number) for number in numbers)


async def set_beds(manager: SyncManager, number: str, beds: int) -> None:
    async with manager.session() as session, session.begin():
        (await session.get_one(Ward, number)).beds = beds


async def test_the_index_is_filled_anew_beside_the_old_one_and_switched(
    primary: AsyncEngine, manager: SyncManager, server: Server
) -> None:
    """D7, again and again: with another mapping, while the name that is searched stays."""
    name = f"{server.prefix}-ward"
    assert await server.indices() == {f"all.{name}": {name}}
    mapping = {"properties": {"beds": {"type": "keyword"}}}
    for generation in ("a.", "b."):
        other = manager_on(primary, server, mapping=mapping)
        rebuilt = await other.rebuild("search")
        assert (rebuilt.backend_id, rebuilt.status, rebuilt.equal) == ("search", "live", True)
        assert [each.backend_id for each in other.registrations] == ["search"]
        await other.aclose()
        assert await server.indices() == {f"all.{generation}{name}": {name}}
        answer = await server.ask("GET", f"{name}/_mapping")
        (told,) = answer.values()
        assert told["mappings"]["properties"]["content"]["properties"]["beds"]["type"] == "keyword"
        assert await server.found() == {str(number): number for number in range(300)}
        # Who knew the old one goes on with the new one, without a restart.
        await set_beds(manager, "7", 7)
        await manager.relay().drain()
        assert (await manager.backend_status("search-next")).status == "removed"
        assert await pending(primary) == 0
    await set_beds(manager, "7", 70)
    async with manager.session() as session, session.begin():
        await session.delete(await session.get_one(Ward, "8"))
    await manager.relay().drain()
    found = await server.found()
    assert (found["7"], "8" in found, len(found)) == (70, False, 299)
    assert (await manager.backend_status("search")).total_errors == 0
    assert (await manager.reconcile("search")).in_sync


async def test_no_reader_sees_less_than_before_while_writers_write(
    primary: AsyncEngine, manager: SyncManager, server: Server
) -> None:
    """D7, guarantee 10: what a writer was told to be there is found, before, at and after the switch."""
    chance, stop, looked = random.Random(5), asyncio.Event(), 0

    async def write_and_look() -> None:
        nonlocal looked
        while not stop.is_set():
            number, beds = str(chance.randrange(300)), chance.randrange(1_000)
            async with manager.session() as session:
                async with session.begin():
                    (await session.get_one(Ward, number, with_for_update=True)).beds = beds
                token = session.token
            assert token is not None
            assert await manager.wait_for_sync(token, timeout=20, backends=["search"], visible=True)
            found = await server.found(refresh=False)
            assert (found.get(number), len(found)) == (beds, 300), number
            looked += 1

    async with running(manager.relay()), asyncio.TaskGroup() as group:
        group.create_task(write_and_look())
        try:
            await eventually(lambda: looked)
            other = manager_on(primary, server)
            rebuilt = await other.rebuild("search")
            await other.aclose()
            after = looked
            await eventually(lambda: looked > after + 3)
        finally:
            stop.set()
    assert rebuilt.equal
    assert list(await server.indices()) == [f"all.a.{server.prefix}-ward"]
    assert (await manager.reconcile("search")).in_sync


async def test_at_the_moment_of_the_switch_nothing_is_on_its_way(
    primary: AsyncEngine, manager: SyncManager, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7, guarantee 10: nobody can claim for the old one, and the new one has, and shows, what the old one has."""
    calls: list[str] = []
    apply, refresh, switch, drained = FreshSearch.apply, FreshSearch.refresh, Generation.switch, SyncManager.drained

    async def slow(self: FreshSearch, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        await asyncio.sleep(0.1)
        return await apply(self, batch)

    async def waited(self: SyncManager, backend_id: str, **tell: Any) -> int:
        dead = await drained(self, backend_id, **tell)
        calls.append("drained")
        return dead

    async def shown(self: FreshSearch) -> None:
        calls.append("refresh")
        await refresh(self)

    async def looked_at(self: Generation, aliases: Iterable[str]) -> None:
        async with raw(primary) as connection, connection.transaction():
            assert await take_turn(connection, "public", "search") is None
        assert await rows(primary, BEHIND) == []
        assert calls[-1] == "refresh", "what it has by now does not show"
        calls.append("switch")
        await switch(self, aliases)

    monkeypatch.setattr(FreshSearch, "apply", slow)
    monkeypatch.setattr(FreshSearch, "refresh", shown)
    monkeypatch.setattr(SyncManager, "drained", waited)
    monkeypatch.setattr(Generation, "switch", looked_at)
    stop = asyncio.Event()

    async def write() -> None:
        beds = 0
        while not stop.is_set():
            beds += 1
            await set_beds(manager, str(beds % 300), 1_000 + beds)

    async with running(manager.relay()), asyncio.TaskGroup() as group:
        group.create_task(write())
        other = manager_on(primary, server)
        try:
            assert (await other.rebuild("search")).equal
        finally:
            stop.set()
            await other.aclose()
    assert "switch" in calls


STEPS = (
    "registered and shadow",
    "filling",
    "recorded for",
    "compared",
    "leads to what was filled",
    "held before is deleted",
)


@pytest.mark.parametrize("step", STEPS)
async def test_it_goes_on_where_it_was_cut_off(
    primary: AsyncEngine, manager: SyncManager, server: Server, step: str
) -> None:
    """D7, K4: at every step that it tells of."""

    class Cut(Exception): ...

    def cut(line: str) -> None:
        if step in line:
            raise Cut(line)

    async def told(tell: Callable[[str], None]) -> Any:
        other = manager_on(primary, server)
        try:
            return await other.rebuild("search", tell=tell)
        finally:
            await other.aclose()

    with pytest.raises(Cut):
        await told(cut)
    await set_beds(manager, "7", 70)
    await manager.relay().drain()
    assert (await server.found())["7"] == 70
    lines: list[str] = []
    rebuilt = await told(lines.append)
    assert (rebuilt.status, rebuilt.equal) == ("live", True)
    assert len(await server.indices()) == 1
    found = await server.found()
    assert (found["7"], len(found)) == (70, 300)
    if step == "leads to what was filled":
        assert not any("registered" in line for line in lines), "it was filled once more"
    assert (await manager.backend_status("search-next")).status == "removed"


async def test_what_is_not_tracked_stays_as_it_is(primary: AsyncEngine, manager: SyncManager, server: Server) -> None:
    """D7: nobody could fill it, so its index is not replaced by one that lacks what was written before."""
    note = SyncEvent.update("Note", "1", {"text": "kept"})
    async with manager.session() as session, session.begin():
        session.record(note)
    await manager.relay().drain()

    async def write_another(line: str) -> None:
        async with manager.session() as session, session.begin():
            session.record(SyncEvent.update("Note", "2", {"text": "new"}))

    writing: list[asyncio.Task[None]] = []

    def tell(line: str) -> None:
        if "registered" in line:
            writing.append(asyncio.create_task(write_another(line)))

    assert (await manager.rebuild("search", tell=tell)).equal
    await asyncio.gather(*writing)
    await manager.relay().drain()
    search = manager.registrations[0].secondary
    assert isinstance(search, OpenSearchSecondary)
    assert [await search.content_of("Note", name) for name in ("1", "2")] == ['{"text":"kept"}', '{"text":"new"}']
    assert set(await server.indices()) == {f"all.{server.prefix}-note", f"all.a.{server.prefix}-ward"}


async def test_nothing_is_switched_while_it_differs(primary: AsyncEngine, manager: SyncManager, server: Server) -> None:
    """D7: what the new mapping refuses is dead for the new one only."""
    other = manager_on(primary, server, mapping={"dynamic": "strict", "properties": {"number": {"type": "keyword"}}})
    rebuilt = await other.rebuild("search")
    await other.aclose()
    assert (rebuilt.backend_id, rebuilt.status, rebuilt.equal) == ("search-next", "shadow", False)
    assert rebuilt.dead == 300
    assert (await server.indices())[f"all.{server.prefix}-ward"] == {f"{server.prefix}-ward"}
    assert (await manager.health()).reasons == ()
    assert len(await server.found()) == 300


async def test_nothing_is_switched_while_it_differs_though_nothing_is_dead(
    primary: AsyncEngine, manager: SyncManager, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """D7: what the new one says that it applied, and does not hold, is found by comparing; the old one stays."""
    apply = FreshSearch.apply

    async def lossy(self: FreshSearch, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        answers = iter(await apply(self, [event for event in batch if event.resource_id != "7"]))
        return [Applied() if event.resource_id == "7" else next(answers) for event in batch]

    other = manager_on(primary, server)
    with monkeypatch.context() as patched:
        patched.setattr(FreshSearch, "apply", lossy)
        rebuilt = await other.rebuild("search")
    assert (rebuilt.backend_id, rebuilt.status, rebuilt.dead, rebuilt.equal) == ("search-next", "shadow", 0, False)
    assert [(drift.kind, drift.resource_id) for drift in rebuilt.proof.samples] == [("missing", "7")]
    assert (await server.indices())[f"all.{server.prefix}-ward"] == {f"{server.prefix}-ward"}
    assert len(await server.found()) == 300
    # Once it is seen to, it goes on.
    assert (await other.rebuild("search")).equal
    await other.aclose()
    assert await server.found() == {str(number): number for number in range(300)}


async def test_no_moment_is_no_switch(manager: SyncManager, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """D7: what is in hand may still change what the old one holds."""
    monkeypatch.setattr("outbox.rebuild._LONGEST_STILL", timedelta(seconds=0.1))
    await set_beds(manager, "7", 70)
    assert await claim_by_hand(manager.engine, "search", lease=timedelta(minutes=5)) is not None
    with pytest.raises(Unavailable, match="no moment"):
        await manager.rebuild("search")
    assert (await server.indices())[f"all.{server.prefix}-ward"] == {f"{server.prefix}-ward"}


async def test_what_cannot_be_rebuilt_is_refused(primary: AsyncEngine) -> None:
    manager = manager_of(primary, MemorySecondary("memory"))
    with pytest.raises(SettingsError, match="cannot be rebuilt"):
        await manager.rebuild("memory")
    with pytest.raises(UnknownSecondary):
        await manager.rebuild("nobody")


@pytest.mark.parametrize(
    ("index", "yes"),
    [("all.x-y", True), ("all.b.x-y", True), ("x-y", False), ("all.ab.x-y", False), ("all.b.x-y.z", False)],
)
def test_an_index_is_known_by_its_name(index: str, yes: bool) -> None:
    assert is_behind(index, "x-y") is yes
