"""Promise 1: random programs of writes, savepoints and errors, against a model that is a dict."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import CheckConstraint, Column, Float, Integer, Text, create_engine, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import declarative_base
from sqlalchemy.pool import NullPool

from outbox import InvalidEvent, MemorySecondary, Registration, SyncConfig, SyncEvent, SyncManager
from outbox.session import SyncOutboxSession


def note_class() -> type[Any]:
    """Return a class of this test alone: a composite key, a rule that the database keeps, a value that JSON lacks."""

    class Note(declarative_base()):
        __tablename__ = "note"
        __table_args__ = (CheckConstraint("value >= 0"),)
        tenant = Column(Text, primary_key=True)
        name = Column(Text, primary_key=True)
        value = Column(Integer, nullable=False)
        score = Column(Float)

    return Note


@dataclass(frozen=True)
class Wish:
    """How a secondary is registered, and which (tenant, type) must be owed to it."""

    tenants: list[str] | None = None
    types: list[str] | None = None
    status: str = "live"
    owed: Callable[[str, str], bool] = lambda _tenant, _type: True


WISHES = {
    "all": Wish(),
    "acme": Wish(tenants=["acme"], owed=lambda tenant, _: tenant == "acme"),
    "notes": Wish(types=["Note", "Other"], owed=lambda _, type_: type_ == "Note"),
    "both": Wish(["acme"], ["Loose"], owed=lambda tenant, type_: (tenant, type_) == ("acme", "Loose")),
    "nothing": Wish(tenants=[], owed=lambda *_: False),
    "shadow": Wish(status="shadow"),
    "paused": Wish(status="paused", types=["Loose"], owed=lambda _, type_: type_ == "Loose"),
    "draining": Wish(status="draining", owed=lambda *_: False),
    "removed": Wish(status="removed", owed=lambda *_: False),
}

Key = tuple[str, str]
Event = tuple[str, str, str, str, int | None]


@pytest.fixture
async def manager(primary: AsyncEngine) -> SyncManager:
    """A manager of tracked notes, its secondaries registered as they wish."""
    registrations = [
        Registration(MemorySecondary(name), tenant_ids=wish.tenants, resource_types=wish.types)
        for name, wish in WISHES.items()
    ]
    made = SyncManager(primary, registrations, config=SyncConfig(doorbell=False))
    note = note_class()
    made.track(note, tenant=lambda row: row.tenant)
    await made.register()
    async with primary.begin() as connection:
        await connection.run_sync(note.metadata.create_all)
        for name, wish in WISHES.items():
            statement = text("update outbox_secondary set status = :status where backend_id = :name")
            await connection.execute(statement, {"status": wish.status, "name": name})
    return made


class Blocking:
    """A `SyncOutboxSession` under the signatures of an `OutboxSession`."""

    def __init__(self, session: SyncOutboxSession) -> None:
        self._session = session

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._session, name)
        return _awaitable(found) if name in {"get", "delete", "flush", "commit", "rollback", "close"} else found

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        with self._session.begin_nested():
            yield


def _awaitable(call: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def called(*args: Any) -> Any:
        return call(*args)

    return called


@dataclass
class Model:
    """What must be true: rows as flushed and as pending, and of each flush the captured and the recorded events."""

    rows: dict[Key, int] = field(default_factory=dict)
    pending: dict[Key, int] = field(default_factory=dict)
    switched: set[Key] = field(default_factory=set)
    recorded: list[Event] = field(default_factory=list)
    flushes: list[tuple[Counter[Event], list[Event]]] = field(default_factory=list)

    def flush(self) -> None:
        captured = Counter(filter(None, map(self._captured, self.rows.keys() | self.pending.keys())))
        self.flushes.append((captured, self.recorded))
        self.rows, self.switched, self.recorded = dict(self.pending), set(), []

    def restore(self, saved: Model) -> None:
        self.__dict__.update(deepcopy(saved).__dict__)

    def _captured(self, key: Key) -> Event | None:
        before, after = self.rows.get(key), self.pending.get(key)
        if before == after and key not in self.switched:
            return None
        operation = "delete" if after is None else "create" if before is None else "update"
        return (operation, key[0], "Note", "/".join(key), after)


class Stop(Exception):
    """The application's own error."""


class Run:
    """Performs a program on a session and on the model, side by side."""

    def __init__(self, manager: SyncManager, session: Any) -> None:
        (tracked,) = manager.tracking
        self.note = tracked.entity
        self.session = session
        self.model = Model()

    async def transactions(self, program: list[tuple[str, list[Any]]]) -> None:
        for ending, steps in program:
            saved = deepcopy(self.model)
            with suppress(Stop, IntegrityError):
                await self.steps(steps)
                if ending == "commit":
                    await self.session.commit()
                    self.model.flush()
                    continue
            await (self.session.close() if ending == "close" else self.session.rollback())
            self.model.restore(saved)

    async def steps(self, steps: list[Any]) -> None:
        for name, *args in steps:
            await getattr(self, name)(*args)

    async def put(self, key: Key, value: int) -> None:
        row = await self._find(key)
        if row is None:
            self.session.add(self.note(tenant=key[0], name=key[1], value=value, score=None))
            # A row deleted and added again is switched by one UPDATE, whatever it held.
            self.model.switched |= {key} & self.model.rows.keys()
        else:
            row.value = value
        self.model.pending[key] = value

    async def drop(self, key: Key) -> None:
        row = await self._find(key)
        if row is None:
            return
        if row in self.session.new:
            self.session.expunge(row)
        else:
            await self.session.delete(row)
        del self.model.pending[key]
        self.model.switched.discard(key)

    async def record(self, tenant: str, number: int) -> None:
        self.session.record(SyncEvent.create("Loose", f"{number}", {"value": number}, tenant_id=tenant))
        self.model.recorded.append(("create", tenant, "Loose", f"{number}", number))

    async def flush(self) -> None:
        if self.session.new or self.session.deleted or self.session.dirty:
            await self.session.flush()
            self.model.flush()

    async def refused(self) -> None:
        """A4: bad content is refused before any SQL, and everything goes on."""
        bad = self.note(tenant="acme", name="bad", value=1, score=float("nan"))
        self.session.add(bad)
        with pytest.raises(InvalidEvent, match=r"^content\.score: "):
            await self.session.flush()
        self.session.expunge(bad)

    async def stop(self) -> None:
        raise Stop

    async def clash(self) -> None:
        self.session.add(self.note(tenant="acme", name="clash", value=-1))
        await self.session.flush()

    async def block(self, ending: str, steps: list[Any]) -> None:
        self.model.flush()
        saved = deepcopy(self.model)
        with suppress(Stop, IntegrityError):
            async with self.session.begin_nested():
                await self.steps(steps)
                if ending == "rollback":
                    raise Stop
            self.model.flush()
            return
        self.model.restore(saved)

    async def _find(self, key: Key) -> Any:
        for row in self.session.new:
            if (row.tenant, row.name) == key:
                return row
        row = await self.session.get(self.note, key)
        return None if row in self.session.deleted else row


keys = st.tuples(st.sampled_from(["acme", "globex"]), st.sampled_from(["a", "b"]))
step = st.deferred(
    lambda: st.one_of(
        st.tuples(st.just("put"), keys, st.integers(0, 2)),
        st.tuples(st.just("drop"), keys),
        st.tuples(st.just("record"), st.sampled_from(["acme", "globex"]), st.integers(0, 99)),
        st.sampled_from([("flush",), ("flush",), ("refused",), ("stop",), ("clash",)]),
        st.tuples(st.just("block"), st.sampled_from(["release", "release", "rollback"]), steps),
    )
)
steps = st.lists(step, max_size=6)
programs = st.lists(
    st.tuples(st.sampled_from(["commit", "commit", "commit", "rollback", "close"]), steps), min_size=1, max_size=4
)
examples = settings(
    max_examples=60,
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    # The zoo asks only whether it fails, and has no minute for the shortest program.
    phases=[Phase.generate] if "OUTBOX_ZOO_ENDINGS" in os.environ else [Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@given(program=programs)
@examples
async def test_async_sessions_leave_exactly_the_events_of_what_they_committed(
    primary: AsyncEngine, manager: SyncManager, program: Any
) -> None:
    """A1, A2, A4, A10."""
    await empty(primary)
    async with manager.session(autoflush=False) as session:
        run = Run(manager, session)
        await run.transactions(program)
    await assert_agrees(primary, run.model)


@given(program=programs)
@examples
async def test_sync_sessions_leave_exactly_the_events_of_what_they_committed(
    primary: AsyncEngine, manager: SyncManager, program: Any
) -> None:
    """A1, A2, A4, A10."""
    engine = create_engine(primary.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    await empty(primary)
    with manager.sync_session(engine, autoflush=False) as session:
        run = Run(manager, Blocking(session))
        await run.transactions(program)
    await assert_agrees(primary, run.model)


async def empty(primary: AsyncEngine) -> None:
    """Start the next example from nothing: all examples of a test share one database."""
    async with primary.begin() as connection:
        await connection.execute(text("truncate note, outbox, outbox_delivery"))


async def assert_agrees(primary: AsyncEngine, model: Model) -> None:
    async with primary.connect() as connection:
        found = (await connection.execute(text("select tenant, name, value from note"))).all()
        columns = "operation, tenant_id, resource_type, resource_id, cast(content ->> 'value' as int), event_id"
        events = (await connection.execute(text(f"select {columns} from outbox order by event_id"))).all()
        deliveries = (await connection.execute(text("select backend_id, event_id from outbox_delivery"))).all()
    assert {(row.tenant, row.name): row.value for row in found} == model.rows
    left = iter([tuple(event)[:5] for event in events])
    for captured, recorded in model.flushes:
        assert Counter(islice(left, captured.total())) == captured
        assert list(islice(left, len(recorded))) == recorded
    assert list(left) == []
    owed = [(name, each.event_id) for each in events for name, wish in WISHES.items() if wish.owed(each[1], each[2])]
    assert Counter(map(tuple, deliveries)) == Counter(owed)
