"""Promise 13: content is stored and delivered exactly, or refused before any SQL by its path and not its value."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import psycopg
import pytest
from sqlalchemy import Column, Float, Integer, text
from sqlalchemy import event as engine_event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base

from outbox import InvalidEvent, MemorySecondary, SyncConfig, SyncEvent, SyncManager, record

CANARY = "zebra-7391"


def nested(depth: int, bottom: Any = 1) -> dict[str, Any]:
    """Return objects within objects: `depth` of them."""
    found = bottom
    for _ in range(depth):
        found = {"a": found}
    return found


def circle() -> dict[str, Any]:
    found: dict[str, Any] = {}
    found["a"] = found
    return found


# What INVARIANTS 3.4 lists, and more: content, and the path at which it must be refused.
REFUSED: list[tuple[Any, str]] = [
    ({"a": f"{CANARY}\0"}, "content.a"),
    ({"a": [{"b": 1}, {"b": f"\0{CANARY}"}]}, "content.a[1].b"),
    ({"a": {f"{CANARY}\0": 1}}, "content.a"),
    ({"a": f"\ud800{CANARY}"}, "content.a"),
    ({f"{CANARY}\udfff": 1}, "content"),
    ({"a": math.nan}, "content.a"),
    ({"a": [0, math.inf]}, "content.a[1]"),
    ({"a": (0, -math.inf)}, "content.a[1]"),
    ({"a": {math.nan: 1}}, "content.a"),
    ({"a": {7391: 1}}, "content.a"),
    ({"a": {7391.5: 1}}, "content.a"),
    ({True: 1, "true": 2}, "content"),
    ({None: 1}, "content"),
    ({1: "x", "1": "y"}, "content"),
    ({"a": {(CANARY,): 1}}, "content.a"),
    ({"a": {b"k": 1}}, "content.a"),
    ({"a": datetime(7391, 1, 1, tzinfo=UTC)}, "content.a"),
    ({"a": date(7391, 1, 1)}, "content.a"),
    ({"a": Decimal("7391.50")}, "content.a"),
    ({"a": UUID(int=7391)}, "content.a"),
    ({"a": CANARY.encode()}, "content.a"),
    ({"a": {CANARY}}, "content.a"),
    ({"a": {"b": {"c": [object()]}}}, "content.a.b.c[0]"),
    ({"a": MappingProxyType({CANARY: 1})}, "content.a"),
    (nested(64, [1]), "content" + ".a" * 64),
    (nested(5_000), "content" + ".a" * 64),
    (circle(), "content" + ".a" * 64),
    ({"a": {"b": 7391 * 10**5_000}}, "content.a.b"),
    ({"k" * 1_025: 1}, "content"),
    ({"a": CANARY * 110_000}, "content"),
    ([CANARY], "content"),
    (7391, "content"),
    (None, "content"),
    (f'{{"a": "{CANARY}\\u0000"}}', "content.a"),
    (f'{{"a": "\\ud800{CANARY}"}}', "content.a"),
    (f'{{"a": {{"b": 1, "b": "{CANARY}"}}}}', "content.a"),
    (f'{{"a": 1, "\\u0061": "{CANARY}"}}', "content"),
    ('{"a": NaN}', "content"),
    ('{"a": -Infinity}', "content"),
    (f'{{"a": "{CANARY}}}', "content"),
    (f'{{"a": "{CANARY}"}} {{}}', "content"),
    (f'["{CANARY}"]', "content"),
    ("null", "content"),
    ("", "content"),
    ("\ufeff{}", "content"),
    (f'{{"a": "{CANARY}'.encode() + b'\xff"}', "content"),
    ('{"a":' * 5_000 + "1" + "}" * 5_000, "content"),
]

EXACT: list[dict[str, Any] | str | bytes] = [
    {},
    {"a": None, "b": False, "c": [], "d": {}, "e": ""},
    {"z": 1, "a": 2, "m": 3},
    {"a": -0.0, "b": 1e308, "c": 2**53 + 1, "d": 5e-324, "e": 10**399, "f": 1.0},
    {"a": True, "b": 1},
    {"__proto__": 1, "_id": 2, "$where": 3, "a.b": 4, "": 5, "constructor": 6, "a[0]": 7},
    {"a": "\u00e9", "b": "e\u0301", "c": "\u202ertl\u200f", "d": "\x01\x1f\x7f\x9b", "e": "\U0001f9d1\u200d\U0001f680"},
    {"a": 'it\'s "quoted" \\ and %s $1 :name {x}', "b": "\r\n\t", "c": "</script>", "d": "\u2028"},
    {"a": (1, [2, (3,)])},
    {"k" * 1_024: 1},
    {"a": "x" * (1_048_576 - 8)},
    {f"{number:x}": 0 for number in range(100_000)},
    nested(64),
    '{"decimal": 1.50, "big": 1e400, "exact": 0.1000000000000000055511151231257827}',
    '{"a":' + "9" * 5_000 + "}",
    ' {\n\t"b" : 1 ,\r\n "a" : [ ] } ',
    '{"a": "\\u00e9\\/\\ud83e\\uddd1"}',
    b'{"a": "\xc3\xa9"}',
]


@pytest.mark.parametrize(("content", "path"), REFUSED)
def test_bad_content_is_refused_with_its_path_and_without_its_value(content: Any, path: str) -> None:
    for build in (SyncEvent.create, SyncEvent.update):
        with pytest.raises(InvalidEvent) as refusal:
            build("Note", "1", content)
        assert refusal.value.path == path
        assert_silent(refusal.value)


def assert_silent(refusal: InvalidEvent) -> None:
    assert not any(secret in f"{refusal} {refusal!r}" for secret in (CANARY, "7391"))
    # What a log would print of the chain must not have it either.
    assert refusal.__cause__ is None
    assert refusal.__context__ is None or refusal.__suppress_context__


def thing_class() -> type[Any]:
    class Thing(declarative_base()):
        __tablename__ = "thing"
        id = Column(Integer, primary_key=True)
        number = Column(Integer, nullable=False, default=0)
        score = Column(Float)
        body = None

    return Thing


def manager_of(primary: AsyncEngine, *tracked: type[Any], **mapping: Any) -> tuple[SyncManager, MemorySecondary]:
    memory = MemorySecondary()
    manager = SyncManager(primary, [memory], config=SyncConfig(doorbell=False))
    for entity in tracked:
        manager.track(entity, **mapping)
    return manager, memory


async def prepared(primary: AsyncEngine, manager: SyncManager, *classes: type[Any]) -> list[str]:
    """Create the tables, register, and return a list that every further statement is put on."""
    await manager.register()
    statements: list[str] = []
    async with primary.begin() as connection:
        for each in classes:
            await connection.run_sync(each.metadata.create_all)
    engine_event.listen(primary.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    return statements


async def rows(primary: AsyncEngine, query: str) -> list[tuple[Any, ...]]:
    async with primary.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


async def test_refused_rows_cost_no_statement_and_leave_the_transaction_usable(primary: AsyncEngine) -> None:
    """A4, for new rows and for changed ones."""
    thing = thing_class()
    manager, _ = manager_of(primary, thing, content=lambda row: row.body)
    statements = await prepared(primary, manager, thing)
    async with manager.session() as session, session.begin():
        good = thing(id=1)
        good.body = {"good": 1}
        session.add(good)
        await session.flush()
        statements.clear()
        for content, path in REFUSED:
            bad = thing(id=2)
            bad.body = content
            session.add(bad)
            assert (await refusal_of(session)).path == path
            session.expunge(bad)
            good.number, good.body = 1, content
            assert (await refusal_of(session)).path == path
            good.number, good.body = 0, {"good": 1}
        assert statements == []
        good.number = 5
    assert await rows(primary, "select operation, content::text from outbox order by event_id") == [
        ("create", '{"good":1}'),
        ("update", '{"good":1}'),
    ]


async def refusal_of(session: Any) -> InvalidEvent:
    with pytest.raises(InvalidEvent) as refusal:
        await session.flush()
    assert_silent(refusal.value)
    return refusal.value


async def test_a_refused_row_whose_key_the_database_makes_costs_no_statement_either(primary: AsyncEngine) -> None:
    """A4: that the key is not known yet is no reason to look at the content too late."""
    thing = thing_class()
    manager, _ = manager_of(primary, thing)
    statements = await prepared(primary, manager, thing)
    async with manager.session() as session, session.begin():
        bad = thing(score=math.nan)
        session.add(bad)
        assert (await refusal_of(session)).path == "content.score"
        assert statements == []
        session.expunge(bad)
        session.add(thing(score=1.5))
    assert [score for (score,) in await rows(primary, "select score from thing")] == [1.5]


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_accepted_content_is_stored_and_delivered_to_the_letter(primary: AsyncEngine, driver: str) -> None:
    manager, memory = manager_of(primary)
    await manager.register()
    events = [SyncEvent.create("Note", f"{number}", content) for number, content in enumerate(EXACT)]
    if driver == "asyncpg":
        async with manager.session() as session, session.begin():
            session.record(events)
    else:
        url = primary.url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(url) as connection:
            record(connection, events)
    await manager.relay().drain()
    stored = await rows(primary, "select resource_id, cast(content as text) from outbox order by event_id")
    assert dict(stored) == {each.resource_id: each.content for each in events}
    for content, each in zip(EXACT, events, strict=True):
        assert memory.content_of("Note", each.resource_id) == each.content
        assert each.content is not None
        if isinstance(content, Mapping):
            assert repr(json.loads(each.content)) == repr(listed(content))
        else:
            assert each.content == (content if isinstance(content, str) else content.decode())


def listed(value: Any) -> Any:
    """Return a value with lists for tuples; its `repr` tells True from 1, 1.0 from 1 and -0.0 from 0.0."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value
