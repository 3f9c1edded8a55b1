"""A store that exists already keeps the contract as a secondary, and what it raises is understood."""

from __future__ import annotations

import asyncio
import errno
import socket
import sqlite3
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiosqlite
import pytest

from examples.sqlite_storage import SqliteStorage
from outbox.attempt import Attempt, Released
from outbox.dispatch import dispatch
from outbox.errors import OutboxError, ResourceBusy, ResourceRefused, SettingsError, Unavailable
from outbox.event import StoredResource, SyncEvent
from outbox.secondaries.base import Applied, Outcome, Rejected, Retry, Stale
from outbox.secondaries.storage import ResourceStorageSecondary
from outbox.testing.contract import SecondaryContract
from outbox.testing.states import CONTENTS, at, held, remove, seen, write

Fault = Callable[[], Awaitable[Any]]


class FaultyStorage(SqliteStorage):
    """The store, which does at some ids what a test says, instead of or before what was asked."""

    def __init__(self, database: aiosqlite.Connection) -> None:
        super().__init__(database)
        self.faults: dict[str, Fault] = {}
        self.listed: list[tuple[str, int]] = []
        self.listing: Callable[[Sequence[StoredResource]], Sequence[StoredResource]] = lambda page: page

    async def create(self, *key: Any, **versions: Any) -> bool:
        raise AssertionError("what cannot be repeated was called")

    async def create_or_update(self, *state: Any, **versions: Any) -> Any:
        answer = await self.faults[state[2]]() if state[2] in self.faults else None
        return await super().create_or_update(*state, **versions) if answer is None else answer

    async def delete(self, *state: Any) -> Any:
        answer = await self.faults[state[2]]() if state[2] in self.faults else None
        return await super().delete(*state) if answer is None else answer

    async def read(self, *key: Any) -> StoredResource | None:
        await self.faults.get("read", _nothing)()
        return await super().read(*key)

    async def list(self, tenant_id: str, resource_type: str, after: str, limit: int) -> Sequence[StoredResource]:
        self.listed.append((after, limit))
        await self.faults.get(f"after {after}", _nothing)()
        return self.listing(await super().list(tenant_id, resource_type, after, limit))


async def _nothing() -> None: ...


def raising(error: BaseException) -> Fault:
    async def fault() -> None:
        raise error

    return fault


def answering(answer: Any) -> Fault:
    async def fault() -> Any:
        return answer

    return fault


def named(names: Iterable[str], position: int = 1) -> list[SyncEvent]:
    return [write(name, position) for name in names]


def attempt(events: list[SyncEvent]) -> Attempt:
    return Attempt(1, "notes", False, events, {})


class TestStorage(SecondaryContract):
    @pytest.fixture
    async def secondary(self, tmp_path: Path) -> AsyncIterator[ResourceStorageSecondary]:
        async with SqliteStorage.open(tmp_path / "notes.db") as storage:
            yield ResourceStorageSecondary(storage, "notes")


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FaultyStorage]:
    async with FaultyStorage.open(tmp_path / "notes.db") as storage:
        assert isinstance(storage, FaultyStorage)
        yield storage


@pytest.fixture
def notes(storage: FaultyStorage) -> ResourceStorageSecondary:
    return ResourceStorageSecondary(storage, "notes", concurrency=3)


@pytest.mark.parametrize("name", CONTENTS)
async def test_content_of_gives_back_every_letter(notes: ResourceStorageSecondary, name: str):
    await notes.apply([write("p", 1, CONTENTS[name])])
    assert await notes.content_of("Patient", "p", tenant_id="acme") == CONTENTS[name]


async def test_the_event_s_id_and_versions_are_passed_whatever_the_content_says(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    event = SyncEvent.create("Patient", "mine", '{"id":"other"}', tenant_id="acme", version="7", fhir_version="4.0")
    assert list(await notes.apply([at(5, event)])) == [Applied()]
    assert await storage.read("acme", "Patient", "mine") == StoredResource(
        resource_type="Patient",
        resource_id="mine",
        tenant_id="acme",
        content='{"id":"other"}',
        version="7",
        fhir_version="4.0",
        position=5,
    )
    assert await storage.count("acme") == await storage.count("acme", "Patient") == 1
    assert await storage.count("acme", "Note") == await storage.count("default") == 0


async def test_a_create_that_was_stored_and_not_answered_is_repeated_without_harm(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    event = at(1, SyncEvent.create("Patient", "p", {"n": 1}, tenant_id="acme"))

    async def stored_then_lost() -> None:
        await SqliteStorage.create_or_update(storage, *event.key, event.content or "", 1)
        raise ConnectionResetError

    storage.faults["p"] = stored_then_lost
    with pytest.raises(Unavailable):
        await notes.apply([event])
    storage.faults.clear()
    assert list(await notes.apply([event])) == [Stale()]
    assert await seen(notes) == held([event])


async def test_positions_and_deletes_outlive_the_process(tmp_path: Path):
    async with SqliteStorage.open(tmp_path / "notes.db") as storage:
        await ResourceStorageSecondary(storage, "notes").apply([write("p", 8), remove("q", 9)])
    async with SqliteStorage.open(tmp_path / "notes.db") as storage:
        notes = ResourceStorageSecondary(storage, "notes")
        late = [write("p", 7), write("q", 8)]
        assert list(await notes.apply(late)) == [Stale(), Stale()]
        assert list(await notes.apply([remove("p", 7), remove("q", 9)])) == [Stale(), Stale()]
        assert await seen(notes) == held([write("p", 8)])
        assert [each.resource_id for each in await storage.list("acme", "Patient", "", 10)] == ["p"]
        assert not await storage.create("acme", "Patient", "p", "{}", 99)
        assert not await storage.create("acme", "Patient", "q", "{}", 9)
        assert await storage.create("acme", "Patient", "q", "{}", 10)


async def test_what_the_store_held_before_yields_to_any_event(
    notes: ResourceStorageSecondary, storage: FaultyStorage, tmp_path: Path
):
    with closing(sqlite3.connect(tmp_path / "notes.db", isolation_level=None)) as other:
        for name in ("old", "older"):
            row = ("acme", "Patient", name, '{"was":"here"}')
            other.execute("insert into resource (tenant_id, resource_type, resource_id, content) values (?,?,?,?)", row)
    assert [(digest.resource_id, digest.position) for digest in await seen(notes)] == [("old", 0), ("older", 0)]
    assert list(await notes.apply([write("old", 1), remove("older", 2)])) == [Applied(), Applied()]
    assert await seen(notes) == held([write("old", 1)])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ResourceBusy("deadlock", "lost"), Retry("deadlock", "lost")),
        (
            ResourceBusy("throttled", "slow down", retry_after=timedelta(seconds=7)),
            Retry("throttled", "slow down", timedelta(seconds=7)),
        ),
        (ResourceRefused("invalid", "no such code"), Rejected("invalid", "no such code")),
        (TimeoutError(), Retry("timeout", "no answer about this resource in time, though the store answers")),
    ],
)
@pytest.mark.parametrize("change", [write, remove])
async def test_an_error_about_one_resource_is_its_outcome_alone(
    notes: ResourceStorageSecondary,
    storage: FaultyStorage,
    error: OutboxError,
    outcome: Outcome,
    change: Callable[[str, int], SyncEvent],
):
    storage.faults["p4"] = raising(error)
    names = [f"p{number}" for number in range(10)]
    expected = [outcome if name == "p4" else Applied() for name in names]
    assert list(await notes.apply([change(name, 2) for name in names])) == expected


async def test_a_row_that_the_table_does_not_take_is_rejected(notes: ResourceStorageSecondary, tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / "notes.db", isolation_level=None)) as other:
        other.execute("create unique index one_of_each on resource (content)")
    outcomes = await notes.apply([write("q", 9), write("r", 9), write("s", 8)])
    refused = Rejected("SQLITE_CONSTRAINT_UNIQUE", "the table does not take this resource")
    assert [type(outcome) for outcome in outcomes] == [Applied, Rejected, Applied]
    assert outcomes[1] == refused


async def test_a_locked_file_is_unavailable(notes: ResourceStorageSecondary, storage: FaultyStorage, tmp_path: Path):
    await storage._database.execute("pragma busy_timeout = 50")
    with closing(sqlite3.connect(tmp_path / "notes.db", isolation_level=None)) as other:
        other.execute("begin immediate")
        with pytest.raises(Unavailable) as caught:
            await notes.apply(named("abcdefgh"))
        assert caught.value.code == "SQLITE_BUSY"
        other.execute("rollback")
    assert list(await notes.apply(named("abcdefgh"))) == [Applied()] * 8


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("down", "for today"), "down"),
        (ConnectionRefusedError(), "unreachable"),
        (socket.gaierror(socket.EAI_NONAME, "no such name"), "unreachable"),
        (OSError("Multiple exceptions: of as many addresses"), "unreachable"),
        (OSError(errno.EHOSTUNREACH, "no way there"), "unreachable"),
        (OSError(errno.ENOSPC, "full"), "unreachable"),
        (ssl.SSLCertVerificationError(1, "expired"), "unreachable"),
    ],
)
async def test_a_store_that_is_gone_blames_no_event(
    notes: ResourceStorageSecondary, storage: FaultyStorage, error: Exception, code: str
):
    storage.faults = dict.fromkeys("abcdef", raising(error))
    with pytest.raises(Unavailable) as caught:
        await notes.apply(named("abcdef"))
    assert caught.value.code == code
    dispatched = await dispatch(notes, attempt(named("abcdef")), timedelta(seconds=30))
    assert dispatched.results == [Released(code)] * 6


async def test_a_name_too_long_for_a_file_is_one_resource_s_trouble(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    storage.faults["c"] = raising(OSError(errno.ENAMETOOLONG, "secret"))
    dispatched = await dispatch(notes, attempt(named("abcdef")), timedelta(seconds=30))
    assert dispatched.unavailable is None
    assert dispatched.results[2] == Retry("adapter_error", "the adapter raised OSError")
    assert [digest.resource_id for digest in await seen(notes)] == list("abdef")


async def test_a_store_that_goes_amid_a_batch_leaves_what_it_did(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    storage.faults["e"] = raising(Unavailable("down", "for an hour", retry_after=timedelta(hours=1)))
    with pytest.raises(Unavailable) as caught:
        await notes.apply(named("abcdefghijkl"))
    outcomes = caught.value.known
    known = [outcome for outcome in outcomes if outcome is not None]
    assert (len(outcomes), outcomes[4], outcomes[-1], caught.value.retry_after) == (12, None, None, timedelta(hours=1))
    assert set(known) == {Applied()}
    dispatched = await dispatch(notes, attempt(named("abcdefghijkl")), timedelta(seconds=30))
    assert dispatched.unavailable is not None
    assert dispatched.results[4] == dispatched.results[-1] == Released("down"), "an outage costs no event an attempt"
    assert [digest.resource_id for digest in await seen(notes)] == list("abcdfghijkl"[: len(known)])


def answering_after(event: asyncio.Event) -> Fault:
    async def fault() -> None:
        await event.wait()

    return fault


async def test_a_time_out_is_the_store_s_when_it_answers_no_read(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    storage.faults |= {"a": raising(TimeoutError()), "read": raising(TimeoutError())}
    with pytest.raises(Unavailable) as caught:
        await notes.apply(named("a"))
    assert caught.value.code == "timeout"


async def test_an_unexplained_error_is_bisected_down_to_its_event(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    events = named(f"p{number}" for number in range(12))
    storage.faults["p5"] = raising(KeyError("secret"))
    with pytest.raises(KeyError):
        await notes.apply(events)
    dispatched = await dispatch(notes, attempt(events), timedelta(seconds=30))
    assert dispatched.unavailable is None
    assert dispatched.results[5] == Retry("adapter_error", "the adapter raised KeyError")
    assert set(map(type, dispatched.results[:5] + dispatched.results[6:])) <= {Applied, Stale}
    assert await seen(notes) == held(events[:5] + events[6:])


@pytest.mark.parametrize("answer", ["created", 7, ("resource", True)])
async def test_an_answer_that_is_no_answer_is_not_taken_for_done(
    notes: ResourceStorageSecondary, storage: FaultyStorage, answer: object
):
    storage.faults |= {"b": answering(answer)}
    first, odd, last = await notes.apply([write("a", 1), remove("b", 2), write("c", 3)])
    assert (first, odd.code, last) == (Applied(), "unknown_outcome", Applied())


async def test_as_many_resources_at_once_as_allowed_and_no_more(
    notes: ResourceStorageSecondary, storage: FaultyStorage
):
    under_way, most = 0, 0
    three = asyncio.Barrier(3)

    async def fault() -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await three.wait()
        under_way -= 1

    storage.faults = dict.fromkeys("abcdefghi", fault)
    async with asyncio.timeout(10):
        assert list(await notes.apply(named("abcdefghi"))) == [Applied()] * 9
    assert most == 3
    with pytest.raises(SettingsError, match="concurrency"):
        ResourceStorageSecondary(storage, "notes", concurrency=0)


@pytest.mark.parametrize("error", [None, OSError("a driver's own word for being cancelled")])
async def test_cancellation_ends_every_call_and_passes_through(
    notes: ResourceStorageSecondary, storage: FaultyStorage, error: Exception | None
):
    ended = []
    three = asyncio.Barrier(4)

    async def fault() -> None:
        await three.wait()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(1)
            if error is not None:
                raise error from None
            raise

    storage.faults = dict.fromkeys("abcdef", fault)
    applying = asyncio.ensure_future(notes.apply(named("abcdef")))
    await three.wait()
    applying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await applying
    assert len(ended) == 3
    assert await seen(notes) == []


async def test_nobody_writes_on_once_apply_has_failed(notes: ResourceStorageSecondary, storage: FaultyStorage):
    """What was under way ends before the answer, and nothing else begins."""
    release = asyncio.Event()
    storage.faults = {"a": answering_after(release), "b": answering_after(release), "c": raising(KeyError())}
    applying = asyncio.ensure_future(notes.apply(named("abcdef")))
    assert await asyncio.wait({applying}, timeout=0.1) == (set(), {applying})
    release.set()
    with pytest.raises(KeyError):
        await applying
    assert [digest.resource_id for digest in await seen(notes)] == ["a", "b"]
    assert len(asyncio.all_tasks()) == 1


async def test_a_scan_asks_for_bounded_pages(notes: ResourceStorageSecondary, storage: FaultyStorage):
    events = [write(f"p{number:03d}", number) for number in range(1, 451)]
    await notes.apply(events)
    assert await seen(notes) == held(events)
    assert storage.listed == [("", 200), ("p200", 200), ("p400", 200), ("p450", 200)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unavailable("down", "for today"), "down"),
        (ResourceBusy("locked", "by another"), "locked"),
        (ConnectionResetError(), "unreachable"),
        (TimeoutError(), "timeout"),
    ],
)
async def test_a_listing_that_breaks_off_never_looks_complete(
    notes: ResourceStorageSecondary, storage: FaultyStorage, error: Exception, code: str
):
    await notes.apply([write(f"p{number:03d}", number) for number in range(1, 451)])
    storage.faults["after p200"] = raising(error)
    with pytest.raises(Unavailable) as caught:
        await seen(notes)
    assert caught.value.code == code


@pytest.mark.parametrize("listing", [lambda page: page[::-1], lambda page: [page[0], *page]])
async def test_a_listing_out_of_order_is_refused(
    notes: ResourceStorageSecondary, storage: FaultyStorage, listing: Callable[[Any], Any]
):
    await notes.apply(named("abc"))
    storage.listing = listing
    with pytest.raises(Unavailable, match="out_of_order"):
        await seen(notes)


async def test_a_listing_that_ignores_where_it_was_ends(notes: ResourceStorageSecondary, storage: FaultyStorage):
    await notes.apply(named("abc"))
    first = await storage.list("acme", "Patient", "", 200)
    storage.listing = lambda _: first
    async with asyncio.timeout(10):
        with pytest.raises(Unavailable, match="out_of_order"):
            await seen(notes)


async def test_deleted_and_damaged_resources_in_a_listing(notes: ResourceStorageSecondary, storage: FaultyStorage):
    """A tombstone is not live, a parsed content equals its text, and what is no JSON equals nothing."""
    gone = {"deleted_at": datetime.now(UTC)}
    odd: list[dict[str, Any]] = [{"content": "{"} | gone, {"content": None}, {"content": {"n": 1.5}}, {"content": "{"}]
    page = [StoredResource(resource_type="Patient", resource_id=f"p{n}", **each) for n, each in enumerate(odd)]
    storage.listing = lambda _: [] if len(storage.listed) > 1 else page
    parsed, damaged = await seen(notes)
    assert parsed == held([write("p2", 0, '{"n":1.50}')])[0]
    assert (damaged.resource_id, damaged.digest) == ("p3", "")
    storage.listing = lambda page: page


async def test_check_says_whether_the_store_answers(notes: ResourceStorageSecondary, storage: FaultyStorage):
    await notes.check()
    storage.faults["read"] = raising(ConnectionAbortedError())
    for asking in (notes.check, lambda: notes.content_of("Patient", "p")):
        with pytest.raises(Unavailable, match="unreachable"):
            await asking()


async def test_find_reads_each_resource_once(notes: ResourceStorageSecondary, storage: FaultyStorage):
    await notes.apply(named("abcdef"))
    asked: list[str] = []
    read = storage.read

    async def noting(*key: str) -> StoredResource | None:
        asked.append(key[2])
        return await read(*key)

    storage.read = noting
    found = await notes.find("acme", "Patient", ["f", "a", "missing", "a"])
    assert sorted(found, key=lambda digest: digest.resource_id) == held([*named("a"), *named("f")])
    assert sorted(asked) == ["a", "f", "missing"]


async def test_find_ends_with_the_first_read_that_fails(notes: ResourceStorageSecondary, storage: FaultyStorage):
    """It never looks as if the others were absent, and nobody reads on behind the answer."""
    await notes.apply(named("abcdefgh"))
    asked = 0

    async def failing_once() -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise ConnectionAbortedError

    storage.faults["read"] = failing_once
    with pytest.raises(Unavailable, match="unreachable"):
        await notes.find("acme", "Patient", [f"p{number}" for number in range(100)])
    assert asked <= 3
    assert len(asyncio.all_tasks()) == 1
