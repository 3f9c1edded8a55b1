"""Headers (D67): correlation id, actor and traceparent reach the secondary, however an event was recorded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry import trace
from sqlalchemy import Column, Engine, Text, create_engine, delete, text, update
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base
from sqlalchemy.pool import NullPool

from outbox import InvalidEvent, MemorySecondary, SyncEvent, SyncManager, headers, record
from tests.relaying import change, dsn_of, manager_of, raw, rows, value

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
OTHER = "00-11111111111111111111111111111111-2222222222222222-00"


@dataclass
class House:
    """A manager with one secondary and a tracked class, and a synchronous engine on the same primary."""

    manager: SyncManager
    engine: Engine
    memory: MemorySecondary
    note: type[Any]

    async def arrived(self) -> dict[str, dict[str, str]]:
        """Relay what is owed; return the headers of what the secondary holds, by resource id."""
        await self.manager.relay().drain()
        return {key[2]: json.loads(event.headers or "{}") for key, event in self.memory.held.items()}


@pytest.fixture
async def house(primary: AsyncEngine) -> AsyncIterator[House]:
    base = declarative_base()

    class Note(base):
        __tablename__ = "note"
        id = Column(Text, primary_key=True)
        title = Column(Text)

    memory = MemorySecondary()
    manager = manager_of(primary, memory)
    manager.track(Note)
    async with primary.begin() as connection:
        await connection.run_sync(base.metadata.create_all)
    await manager.register()
    engine = create_engine(dsn_of(primary).replace("+asyncpg", "+psycopg"), poolclass=NullPool)
    yield House(manager, engine, memory, Note)
    engine.dispose()


async def flushed(house: House, **options: Any) -> None:
    async with house.manager.session(**options) as session, session.begin():
        session.add(house.note(id="1"))


async def flushed_sync(house: House, **options: Any) -> None:
    with house.manager.sync_session(house.engine, **options) as session, session.begin():
        session.add(house.note(id="1"))


async def recorded(house: House, **options: Any) -> None:
    async with house.manager.session(**options) as session, session.begin():
        session.record(change("1"))


async def recorded_many(house: House, **options: Any) -> None:
    async with house.manager.session(**options) as session, session.begin():
        session.record(change(name) for name in "12")


async def executed(house: House, **options: Any) -> None:
    async with house.manager.session(**options) as session, session.begin():
        await session.execute(text("insert into note values ('1', 'a'), ('2', 'b')"))
        await session.execute_recorded(update(house.note).values(title="c"))


async def deleted(house: House, **options: Any) -> None:
    async with house.manager.session(**options) as session, session.begin():
        await session.execute(text("insert into note values ('1', 'a')"))
        await session.execute_recorded(delete(house.note))


async def renamed(house: House, **options: Any) -> None:
    """One change, two events: the resource it was is deleted."""
    async with house.manager.session(**options) as session, session.begin():
        await session.execute(text("insert into note values ('1', 'a')"))
        (await session.get_one(house.note, "1")).id = "2"


async def recorded_raw(house: House) -> None:
    async with house.manager.engine.begin() as connection:
        await record(connection, change("1"))


async def recorded_raw_sync(house: House) -> None:
    with house.engine.begin() as connection:
        record(connection, [change("1"), change("2")])


async def recorded_asyncpg(house: House) -> None:
    async with raw(house.manager.engine) as connection, connection.transaction():
        await record(connection, change("1"))


Way = Callable[..., Awaitable[None]]
OF_SESSIONS: list[Way] = [flushed, flushed_sync, recorded, recorded_many, executed, deleted, renamed]
RAW: list[Way] = [recorded_raw, recorded_raw_sync, recorded_asyncpg]


@pytest.mark.parametrize("way", [*OF_SESSIONS, *RAW])
async def test_headers_of_the_context_reach_the_secondary(house: House, way: Way) -> None:
    with headers({"request": "/notes"}, correlation_id="c-1", actor="Zoë", traceparent=PARENT):
        await way(house)
    said = {"request": "/notes", "correlation-id": "c-1", "actor": "Zoë", "traceparent": PARENT}
    arrived = await house.arrived()
    assert arrived
    assert arrived == dict.fromkeys(arrived, said)
    event = house.memory.held[next(iter(house.memory.held))]
    assert [event.header(name) for name in (*said, "other")] == [*said.values(), None]


@pytest.mark.parametrize("way", OF_SESSIONS)
async def test_headers_of_the_session_reach_the_secondary(house: House, way: Way) -> None:
    await way(house, correlation_id="c-1", actor="Zoë", traceparent=PARENT, headers={"request": "/notes"})
    said = {"request": "/notes", "correlation-id": "c-1", "actor": "Zoë", "traceparent": PARENT}
    arrived = await house.arrived()
    assert arrived
    assert arrived == dict.fromkeys(arrived, said)


@pytest.mark.parametrize("way", [*OF_SESSIONS, *RAW])
async def test_where_nothing_is_said_nothing_is_carried(house: House, way: Way) -> None:
    await way(house)
    assert await value(house.manager.engine, "select count(*) from outbox where headers is not null") == 0
    await house.arrived()
    assert {event.header("actor") for event in house.memory.held.values()} == {None}


async def test_the_event_wins_over_the_session_and_the_session_over_the_context(house: House) -> None:
    own = SyncEvent.create("Thing", "1", {}, headers={"correlation-id": "own", "mine": "own"})
    with headers({"where": "outer"}, actor="outer"), headers(correlation_id="inner", actor="inner", traceparent=PARENT):
        async with house.manager.session(actor="session", correlation_id="session") as session, session.begin():
            session.record(own)
    carried = {
        "where": "outer",
        "correlation-id": "own",
        "actor": "session",
        "traceparent": PARENT,
        "mine": "own",
    }
    assert await house.arrived() == {"1": carried}
    assert own.headers == '{"correlation-id":"own","mine":"own"}', "an event is immutable"


async def test_a_keyword_wins_over_the_mapping_beside_it(house: House) -> None:
    await recorded(house, headers={"actor": "mapping"}, actor="keyword")
    assert await house.arrived() == {"1": {"actor": "keyword"}}


async def test_nothing_leaks_from_one_session_or_context_to_the_next(house: House) -> None:
    first, second = house.manager.session(actor="first"), house.manager.session(correlation_id="c-2")
    async with first, second, first.begin(), second.begin():
        first.record(change("1"))
        second.record(change("2"))
    with headers(actor="third"):
        with headers(correlation_id="c-3"):
            pass
        await record_alone(house, "3")
    with pytest.raises(LookupError), headers(actor="fourth"):
        raise LookupError
    await record_alone(house, "4")
    assert await house.arrived() == {
        "1": {"actor": "first"},
        "2": {"correlation-id": "c-2"},
        "3": {"actor": "third"},
        "4": {},
    }


async def record_alone(house: House, name: str) -> None:
    async with house.manager.session() as session, session.begin():
        session.record(change(name))


async def test_what_was_recorded_takes_nothing_from_where_it_is_written(house: House) -> None:
    """Who asked for it is who called `record`, not who happened to commit."""
    async with house.manager.session() as session:
        with headers(correlation_id="c-1"):
            session.record(change("1"))
        session.record(change("2"))
        with headers(correlation_id="c-2", actor="somebody else"):
            await session.commit()
    assert await house.arrived() == {"1": {"correlation-id": "c-1"}, "2": {}}


async def test_tasks_inherit_and_keep_apart(house: House) -> None:
    started = asyncio.Barrier(2)

    async def request(name: str) -> None:
        with headers(correlation_id=name):
            await started.wait()
            await asyncio.create_task(record_alone(house, name))
            await asyncio.to_thread(record_in_thread, house, f"{name}-thread")

    with headers(actor="server"):
        await asyncio.gather(request("a"), request("b"))
    assert await house.arrived() == {
        name: {"actor": "server", "correlation-id": name[0]} for name in ("a", "b", "a-thread", "b-thread")
    }


def record_in_thread(house: House, name: str) -> None:
    with house.manager.sync_session(house.engine) as session, session.begin():
        session.record(change(name))


@pytest.mark.parametrize("way", [*OF_SESSIONS, *RAW])
async def test_the_current_span_gives_the_traceparent_unless_one_is_given(house: House, way: Way) -> None:
    with trace.use_span(span_of(PARENT)):
        await way(house)
    arrived = await house.arrived()
    assert arrived
    assert arrived == {key: {"traceparent": PARENT} for key in arrived}


async def test_a_given_traceparent_wins_over_the_current_span(house: House) -> None:
    own = SyncEvent.create("Thing", "own", {}, headers={"traceparent": OTHER})
    with trace.use_span(span_of(PARENT)):
        async with house.manager.session() as session, session.begin():
            session.record(own)
        async with house.manager.session(traceparent=OTHER) as session, session.begin():
            session.record(change("session"))
        with headers(traceparent=OTHER):
            await record_alone(house, "context")
    assert await house.arrived() == {key: {"traceparent": OTHER} for key in ("own", "session", "context")}


def span_of(traceparent: str) -> trace.Span:
    _, trace_id, span_id, flags = (int(part, 16) for part in traceparent.split("-"))
    return trace.NonRecordingSpan(trace.SpanContext(trace_id, span_id, False, trace.TraceFlags(flags)))


BAD: list[tuple[str, Any]] = [
    *(("actor", given) for given in (7391, b"7391", True, "", "a\n7391", "\x7f7391", "\ud8007391", "7391" * 257)),
    *(("correlation_id", given) for given in (7391, "", "7391\0", "é" * 513)),
    *(
        ("traceparent", given)
        for given in (
            7391,
            "",
            "7391",
            PARENT.upper(),
            f" {PARENT}",
            f"{PARENT}-7391",
            f"ff{PARENT[2:]}",
            f"00-{'0' * 32}-00f067aa0ba902b7-01",
            f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
            PARENT[:-1],
        )
    ),
]


@pytest.mark.parametrize(("field", "given"), BAD)
async def test_a_bad_header_is_refused_by_its_name_wherever_it_is_given(house: House, field: str, given: Any) -> None:
    """P3 of the headers that are ours: by path, never by value, and before any SQL."""
    name = field.replace("_", "-")
    attempts: list[Callable[[], Any]] = [
        lambda: house.manager.session(**{field: given}),
        lambda: house.manager.session(headers={name: given}),
        lambda: house.manager.sync_session(house.engine, **{field: given}),
        lambda: headers(**{field: given}).__enter__(),
        lambda: headers({name: given}).__enter__(),
        lambda: change_with({name: given}),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidEvent) as refusal:
            attempt()
        assert refusal.value.path == f"headers.{name}"
        assert "7391" not in f"{refusal.value} {refusal.value!r}"
    await record_alone(house, "1")
    assert await house.arrived() == {"1": {}}


def change_with(given: dict[str, Any]) -> SyncEvent:
    return SyncEvent.update("Thing", "1", {}, headers=given)


@pytest.mark.parametrize(
    "given", [[("a", "b")], "actor", {"": "a"}, {7391: "a"}, {"a\n": "b"}, {"a": 7391}, {"a" * 129: "b"}]
)
async def test_a_bad_header_under_another_name_is_refused_too(house: House, given: Any) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: house.manager.session(headers=given),
        lambda: headers(given).__enter__(),
    ]
    for attempt in attempts:
        with pytest.raises(InvalidEvent) as refusal:
            attempt()
        assert refusal.value.path == "headers"
        assert "7391" not in f"{refusal.value} {refusal.value!r}"


@pytest.mark.parametrize("given", [PARENT, OTHER, f"cc{PARENT[2:]}", f"cc{PARENT[2:]}-what-comes-later"])
async def test_a_traceparent_of_a_later_version_is_carried_as_it_is(house: House, given: str) -> None:
    await recorded(house, traceparent=given)
    assert await house.arrived() == {"1": {"traceparent": given}}


ODD = ["[1,2]", "null", "7", '{"actor":7}', "{}", "[" * 5_000 + "]" * 5_000, '{"a":' + "9" * 5_000 + "}"]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:12])
def test_a_header_is_none_in_what_somebody_inserted_by_hand(odd: str) -> None:
    assert change("1").header("actor") is None
    assert SyncEvent("t", "Thing", "1", change("1").operation, "{}", headers=odd).header("actor") is None


@pytest.mark.parametrize("odd", ["[1,2]", "null", '{"actor":7}'])
async def test_odd_headers_of_an_event_built_by_hand_are_not_spoilt(house: House, odd: str) -> None:
    odd_event = SyncEvent("t", "Thing", "1", change("1").operation, "{}", headers=odd)
    with headers(actor="context"):
        async with house.manager.session() as session, session.begin():
            session.record(odd_event)
    stored = await value(house.manager.engine, "select cast(headers as text) from outbox")
    assert json.loads(stored) == json.loads(odd)


async def test_a_rolled_back_session_goes_on_with_its_headers(house: House) -> None:
    async with house.manager.session(actor="a") as session:
        session.record(change("1"))
        await session.rollback()
        session.record(change("2"))
        savepoint = await session.begin_nested()
        session.record(change("3"))
        await savepoint.rollback()
        session.add(house.note(id="4"))
        await session.commit()
    assert await house.arrived() == {"2": {"actor": "a"}, "4": {"actor": "a"}}


async def test_two_changes_of_one_resource_by_two_people_are_two_events_with_two_actors(house: House) -> None:
    async with house.manager.session() as session, session.begin():
        for actor in ("a", "b"):
            with headers(actor=actor):
                session.record(change("1"))
    found = await rows(house.manager.engine, "select headers->>'actor' as actor from outbox order by event_id")
    assert [row["actor"] for row in found] == ["a", "b"]
