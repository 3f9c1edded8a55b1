"""Promise 13: limits, column types, and any value at all that somebody may put into content."""

from __future__ import annotations

import asyncio
import json
import math
import random
import string
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import Column, Date, DateTime, Float, Integer, Interval, LargeBinary, Numeric, Text, Time, Uuid, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base

from outbox import InvalidEvent, MemorySecondary, Outcome, Rejected, SettingsError, SyncConfig, SyncEvent, SyncManager
from outbox.content import Limits, canonical, encode_content


def nested(depth: int) -> dict[str, Any]:
    """Return objects within objects: `depth` of them."""
    found: Any = 1
    for _ in range(depth):
        found = {"a": found}
    return found


def test_limits_are_settings() -> None:
    """P2."""
    tight = Limits(content_bytes=30, depth=2, id_bytes=4, key_bytes=3)
    wide = Limits(content_bytes=3_000_000, depth=100, id_bytes=1_000, key_bytes=2_000)
    for content, name, path in [
        ({"abcd": 1}, "1", "content"),
        ({"a": {"b": {}}}, "1", "content.a.b"),
        ({"a": "x" * 30}, "1", "content"),
        ("{" + " " * 30 + "}", "1", "content"),
        ({}, "12345", "resource_id"),
    ]:
        with pytest.raises(InvalidEvent) as refusal:
            SyncEvent.create("Note", name, content, limits=tight)
        assert refusal.value.path == path
    for fine in (nested(100), {"k" * 2_000: 1}, {"a": "x" * 2_000_000}):
        assert SyncEvent.create("Note", "x" * 1_000, fine, limits=wide).decoded() == fine


@pytest.mark.parametrize("content", [nested(3_000), '{"a":' * 3_000 + "1" + "}" * 3_000], ids=["dict", "text"])
def test_a_depth_that_python_cannot_follow_is_refused_by_type(content: Any) -> None:
    """P2: a high limit of ours must not let the interpreter's show through."""
    with suppress(InvalidEvent):
        stored = SyncEvent.create("Note", "1", content, limits=Limits(depth=10_000)).content
        assert canonical(stored or "")


class RejectingSecondary(MemorySecondary):
    """Takes nothing, ever."""

    async def apply(self, batch: Sequence[SyncEvent]) -> Sequence[Outcome]:
        return [Rejected("refused") for _ in batch]


async def test_an_id_as_long_as_its_limit_can_also_fail(primary: AsyncEngine) -> None:
    """P2: a held key is an entry of an index; a limit beyond what that takes would fail every settle (54000)."""
    name = "".join(random.choices(string.ascii_letters + string.digits, k=4_000))
    try:
        event = SyncEvent.create("Note", name, {}, limits=Limits(id_bytes=4_000))
    except (InvalidEvent, SettingsError):
        return
    manager = SyncManager(primary, [RejectingSecondary()], config=SyncConfig(doorbell=False))
    await manager.register()
    async with manager.session() as session, session.begin():
        session.record(event)
    async with asyncio.timeout(10):
        await manager.relay().drain()
    (failure,) = await manager.failures()
    assert (failure.resource_id, failure.state) == (name, "dead")


def typed_class() -> type[Any]:
    class Typed(declarative_base()):
        __tablename__ = "typed"
        id = Column(Integer, primary_key=True)
        at = Column(DateTime(timezone=True))
        on = Column(Date)
        clock = Column(Time)
        price = Column(Numeric)
        score = Column(Float)
        name = Column(Text)
        token = Column(Uuid)
        raw = Column(LargeBinary)
        took = Column(Interval)

    return Typed


TYPED = [
    ("at", datetime(1, 1, 1, tzinfo=UTC), "0001-01-01T00:00:00+00:00"),
    ("at", datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC), "9999-12-31T23:59:59.999999+00:00"),
    ("on", date(9999, 12, 31), "9999-12-31"),
    ("clock", time(23, 59, 59, 1), "23:59:59.000001"),
    ("price", Decimal("1.50"), "1.50"),
    ("price", Decimal("1E+30"), "1E+30"),
    ("score", -0.0, -0.0),
    ("score", 5e-324, 5e-324),
    ("name", "e\u0301 \u202e ", "e\u0301 \u202e "),
    ("token", UUID(int=7), "00000000-0000-0000-0000-000000000007"),
]


@pytest.fixture
async def typed(primary: AsyncEngine) -> tuple[SyncManager, type[Any]]:
    """A manager that tracks a class with columns of many types, by its default mapping."""
    entity = typed_class()
    manager = SyncManager(primary, [MemorySecondary()], config=SyncConfig(doorbell=False))
    manager.track(entity)
    await manager.register()
    async with primary.begin() as connection:
        await connection.run_sync(entity.metadata.create_all)
    return manager, entity


async def test_columns_of_every_type_arrive_exactly(primary: AsyncEngine, typed: tuple[SyncManager, type[Any]]) -> None:
    """P4: the conversions that are made are written down, and lossless."""
    manager, entity = typed
    async with manager.session() as session, session.begin():
        session.add_all(entity(id=number, **{name: value}) for number, (name, value, _) in enumerate(TYPED))
    found = dict(await rows(primary, "select resource_id, cast(content as text) from outbox"))
    for number, (name, _, expected) in enumerate(TYPED):
        assert repr(json.loads(found[f"{number}"])[name]) == repr(expected)


async def test_columns_that_json_cannot_hold_are_refused_by_name(typed: tuple[SyncManager, type[Any]]) -> None:
    """P4."""
    manager, entity = typed
    async with manager.session() as session, session.begin():
        for name, value in [("raw", b"7391"), ("took", timedelta(days=7391)), ("score", math.inf)]:
            bad = entity(id=1, **{name: value})
            session.add(bad)
            with pytest.raises(InvalidEvent) as refusal:
                await session.flush()
            assert refusal.value.path == f"content.{name}"
            assert "7391" not in str(refusal.value)
            session.expunge(bad)


async def rows(primary: AsyncEngine, query: str) -> list[tuple[Any, ...]]:
    async with primary.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(query))]


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(max_size=6)
    | st.text(st.characters(categories=["Cc", "Cs", "Cf", "Mn"]), max_size=3)
    | st.binary(max_size=3)
    | st.decimals(allow_nan=False)
    | st.dates()
    | st.uuids()
)
texts = st.text(max_size=5) | st.sampled_from(["__proto__", "a.b", "\0", "\ud800", ""])
keys = st.one_of(
    texts, texts, texts, texts, st.integers(), st.booleans(), st.none(), st.floats(), st.binary(max_size=2)
)
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(keys, inner, max_size=4)
        | st.frozensets(st.integers(), max_size=2)
    ),
    max_leaves=12,
)


@given(contents=st.lists(st.dictionaries(texts, anything, max_size=4) | anything | st.text(max_size=20), max_size=8))
@settings(
    max_examples=80,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_any_value_is_either_stored_and_equal_or_refused_by_type(
    primary: AsyncEngine, typed: tuple[SyncManager, type[Any]], contents: list[Any]
) -> None:
    """P5."""
    manager, _ = typed
    accepted: list[tuple[Any, SyncEvent]] = []
    for content in contents:
        event = event_of(content)
        if event is not None:
            accepted.append((content, event))
        elif isinstance(content, dict):
            assert not plain(content)
    async with manager.session() as session, session.begin():
        await session.execute(text("truncate outbox, outbox_delivery"))
        session.record(event for _, event in accepted)
    stored = await rows(primary, "select cast(content as text) from outbox order by event_id")
    for (content, event), (text_,) in zip(accepted, stored, strict=True):
        assert text_ == event.content
        if not isinstance(content, str):
            assert plain(content)
            assert repr(json.loads(text_)) == repr(listed(content))
        else:
            assert text_ == content
        assert canonical(text_)


def event_of(content: Any) -> SyncEvent | None:
    with suppress(InvalidEvent):
        return SyncEvent.create("Note", "1", content)
    return None


def plain(value: Any) -> bool:
    """Say whether JSON and PostgreSQL can hold a value exactly: the rule, written a second time."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and plain(key) and plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain, value))
    if isinstance(value, str):
        return not any(character == "\0" or 0xD800 <= ord(character) <= 0xDFFF for character in value)
    return math.isfinite(value) if isinstance(value, float) else value is None or isinstance(value, int)


def listed(value: Any) -> Any:
    """Return a value with lists for tuples; its `repr` tells True from 1, 1.0 from 1 and -0.0 from 0.0."""
    if isinstance(value, dict):
        return {key: listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, (list, tuple)) else value


json_texts = st.one_of(
    anything.filter(plain).map(lambda value: json.dumps(value, ensure_ascii=False)),
    anything.filter(plain).map(lambda value: json.dumps({"a": value})),
    st.text('{}[]":,\\u0dkae1E.-', max_size=24),
    st.sampled_from(
        [
            '{"a":1,"a":2}',
            '{"b":[{"a":1,"a":{}}]}',
            '{"a":"\\u0000"}',
            '{"a":"\\ud800"}',
            '{"\ud800":1}',
            '{"a":[[[[[]]]]]}',
            '{"a":[1,[2,{"b":[]}]]}',
            '{"abcdefghi":1}',
            '{"a":1e999999999999999999999}',
            '{"a":NaN}',
            "[{}]",
            "true",
            "7",
            "\ufeff{}",
            '{"a":' + "9" * 5_000 + "}",
        ]
    ),
)


@given(
    content=st.dictionaries(texts, anything, max_size=4) | anything | json_texts,
    limits=st.sampled_from([Limits(), Limits(depth=3, key_bytes=8, content_bytes=80), Limits(depth=1, key_bytes=1)]),
)
@example(content='{"a":1,"a":2}', limits=Limits())
@example(content='{"a":[[[[[]]]]]}', limits=Limits(depth=3))
@example(content='{"a":"\\u0000"}', limits=Limits())
@example(content={1: "a"}, limits=Limits())
@settings(max_examples=500, deadline=None, database=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
def test_the_quick_look_says_what_the_whole_walk_says(content: Any, limits: Limits) -> None:
    """P5: nothing is taken that a walk through every value would refuse, and nothing is written otherwise."""
    quick = written_or_refused(content, limits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("outbox.content.is_plain_text", lambda *_: False)
        patch.setattr("outbox.content.text_of_plain", lambda *_: None)
        assert quick == written_or_refused(content, limits)


def written_or_refused(content: Any, limits: Limits) -> tuple[str, str]:
    try:
        return "written", encode_content(content, limits)
    except InvalidEvent as error:
        return error.path, error.problem


def test_what_is_usual_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every writer waits for it: a walk through every value takes about twice as long."""
    monkeypatch.setattr("outbox.content._walk", lambda *_: pytest.fail("walked"))
    usual = {"resourceType": "Patient", "name": [{"family": "Müller", "given": ["A", "B"]}], "x": [1, 2.5, True, None]}
    assert json.loads(encode_content(usual)) == usual
    assert encode_content(json.dumps(usual, ensure_ascii=False).encode())
