"""Promise 14: nothing that holds content reaches a log line, a stored error, a status or an exception."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from typing import Any, NoReturn

import asyncpg
import psycopg
import pytest
from sqlalchemy import Column, Text, create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import declarative_base
from sqlalchemy.pool import NullPool

from outbox import (
    InvalidEvent,
    MemorySecondary,
    Rejected,
    Retry,
    SyncConfig,
    SyncEvent,
    SyncManager,
    Unavailable,
    record,
)
from outbox.migrate import migrate
from outbox.testing.child import ServerMissing
from outbox.testing.postgres import EmbeddedPostgres
from tests.relaying import execute, manager_of, running, write
from tests.scripted import ScriptedSecondary
from tests.waiting import eventually

CONTENT, IDENTITY, ERROR = "zebra-content-7391", "zebra-id-7391", "zebra-error-7391"
CANARY = "zebra"

HASTY = SyncConfig(
    doorbell=False,
    # Nothing here is about losing it, and a busy machine may stand still for a moment.
    lease=timedelta(milliseconds=1_500),
    attempt_deadline=timedelta(milliseconds=500),
    max_attempts=2,
    retry_initial=timedelta(milliseconds=1),
    retry_max=timedelta(milliseconds=2),
    breaker_initial=timedelta(milliseconds=1),
    breaker_max=timedelta(milliseconds=2),
)

Answer = Callable[[Sequence[SyncEvent]], Any]


class Faulty(MemorySecondary):
    """A secondary that answers every batch as it was told to."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self._answer = answer

    async def apply(self, batch: Sequence[SyncEvent]) -> Any:
        answer = self._answer(batch)
        return await answer if asyncio.iscoroutine(answer) else answer


class Checked(Faulty):
    """One that can be asked whether it is there, and fails in an unexpected way."""

    async def check(self) -> None:
        raise RuntimeError(ERROR)


class Unspeakable(Exception):
    """An error whose text cannot be had."""

    def __str__(self) -> NoReturn:
        raise RuntimeError(ERROR)

    __repr__ = __str__


def raising(error: Callable[[str], BaseException]) -> Answer:
    """Answer by raising an error that quotes what it was given, as drivers do."""

    def answer(batch: Sequence[SyncEvent]) -> NoReturn:
        quoted = f"{ERROR}: {[(event.resource_id, event.content) for event in batch]}"
        raise error(quoted) from ValueError(quoted)

    return answer


FAULTS: dict[str, Faulty] = {
    "an error that quotes": Faulty(raising(RuntimeError)),
    "an error that quotes as a mapping does": Faulty(raising(KeyError)),
    "errors in a group": Faulty(raising(lambda quoted: ExceptionGroup(quoted, [ValueError(quoted)]))),
    "an error without a text": Faulty(raising(lambda _: Unspeakable())),
    "an error of ten megabytes": Faulty(raising(lambda quoted: RuntimeError(quoted * 100_000))),
    "a failure to encode": Faulty(raising(lambda quoted: UnicodeEncodeError("ascii", quoted, 0, 1, quoted))),
    "an operating system's error": Faulty(raising(lambda quoted: OSError(5, quoted, quoted))),
    "a timeout": Faulty(raising(TimeoutError)),
    "unavailable": Faulty(raising(lambda quoted: Unavailable("down", quoted))),
    "no answer": Faulty(lambda _: asyncio.sleep(60)),
    "no answer, and an unexpected error when asked": Checked(lambda _: asyncio.sleep(60)),
    "an answer of nothing": Faulty(lambda _: None),
    "an answer of the events": Faulty(list),
    "an answer of texts": Faulty(lambda batch: [ERROR for _ in batch]),
    "an answer that is too long": Faulty(lambda batch: [Rejected("x", ERROR)] * (len(batch) + 1)),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_failing_secondary_leaks_nothing(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """F6: and it is an outcome, which ends no loop: attempts are closed, and what is owed is still owed."""
    caplog.set_level(logging.DEBUG, "outbox")
    caplog.set_level(logging.DEBUG, "asyncio")
    manager = SyncManager(primary, [FAULTS[fault]], config=HASTY)
    raised = await carried(manager)
    assert raised == []
    assert await leaks(manager) == []
    assert_silent(caplog)
    (status,) = await manager.all_statuses()
    assert (status.pending, status.in_flight) == (3, 0)


async def carried(manager: SyncManager, batches: int = 6) -> list[str]:
    """Write three events and carry some batches; return the errors that came out, as a log would print them."""
    await manager.register()
    async with manager.session() as session, session.begin():
        for name in ("1", IDENTITY, "3"):
            session.record(SyncEvent.create("Note", name, {"name": CONTENT}, headers={"actor": CONTENT}))
    relay = manager.relay()
    raised = []
    for _ in range(batches):
        try:
            async with asyncio.timeout(10):
                await relay.run_once("memory")
        except Exception as error:  # noqa: BLE001 - whatever comes out is what is looked at
            raised.append("".join(traceback.format_exception(error)))
    return raised


async def leaks(manager: SyncManager) -> list[str]:
    """Return what the tables and statuses show of a canary, outside the columns that are there for it."""
    queries = [
        "select cast(found as text) from outbox_attempt as found",
        "select cast(found as text) from outbox_secondary as found",
        "select concat_ws(' ', error_code, error) from outbox_hold",
    ]
    shown = [repr(await manager.all_statuses())]
    shown += [f"{each.error_code} {each.error}" for each in await manager.failures()]
    async with manager.engine.connect() as connection:
        for query in queries:
            shown += (await connection.execute(text(query))).scalars()
    return [each for each in shown if CANARY in each]


def assert_silent(caplog: pytest.LogCaptureFixture) -> None:
    assert CANARY not in caplog.text
    assert not [each for each in caplog.records if CANARY in repr(each.__dict__)]


FIELDS = {"outbox_backend_id", "outbox_attempt_id", "outbox_error_code", "outbox_dead"}


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What a handler of structured logs gets beside the line."""
    return {name: value for name, value in vars(record).items() if name.startswith("outbox_")}


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (lambda batch: [Rejected("malformed", ERROR) for _ in batch], "malformed"),
        (raising(RuntimeError), "adapter_error"),
    ],
    ids=["rejected", "retried too often"],
)
async def test_keys_that_died_are_counted_in_a_line_that_names_none(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture, answer: Answer, code: str
) -> None:
    """D69: one warning per attempt, its numbers as fields; what it is about is in `failures` and nowhere else."""
    caplog.set_level(logging.DEBUG, "outbox")
    manager = SyncManager(primary, [Faulty(answer)], config=HASTY)
    assert await carried(manager) == []
    lines = [each for each in caplog.records if "outbox_dead" in fields_of(each)]
    assert sum(each.outbox_dead for each in lines) == len(await manager.failures()) == 3
    async with primary.connect() as connection:
        failed = text("select attempt_id from outbox_attempt where retried + rejected > 0")
        attempts = (await connection.execute(failed)).scalars().all()
    for each in lines:
        assert each.levelno == logging.WARNING
        assert fields_of(each).keys() == FIELDS
        assert (each.outbox_backend_id, each.outbox_error_code) == ("memory", code)
        assert each.outbox_attempt_id in attempts
    assert len({each.outbox_attempt_id for each in lines}) == len(lines), "more than a line for an attempt"
    assert_silent(caplog)


async def test_every_warning_about_a_secondary_has_its_fields(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """D69: an attempt taken over, its late end, and a claim and a settle that failed."""
    slow, other = ScriptedSecondary("search"), ScriptedSecondary("search")
    settings: dict[str, Any] = {"lease": 30, "attempts_in_flight": 1, "poll_interval": 0.05}
    late, early = (manager_of(primary, each, **settings) for each in (slow, other))
    await late.register()
    first, second = (SyncEvent.create("Note", f"{IDENTITY}-{number}", {"name": CONTENT}) for number in range(2))
    for each in (slow, other):
        each.always(first.resource_id, Rejected("malformed", ERROR))
        each.always(second.resource_id, Rejected("malformed", ERROR))
    slow.hang()
    await write(late, first)
    async with running(late.relay()):
        await eventually(lambda: slow.running)
        await execute(primary, "update outbox_attempt set lease_until = now() - interval '1 second'")
        async with running(early.relay()):
            await eventually(lambda: "taking over" in caplog.text and other.calls)
            slow.release()
            await eventually(lambda: "no longer ours" in caplog.text)
            slow.hang()
            other.hang()
            await write(late, second)
            await eventually(lambda: slow.running or other.running)
            await execute(primary, "alter table outbox_hold rename to elsewhere")
            slow.release()
            other.release()
            await eventually(lambda: "settle failed" in caplog.text and "claim failed" in caplog.text)
            await execute(primary, "alter table elsewhere rename to outbox_hold")
            await eventually(lambda: caplog.text.count("dead keys") == 2)
    lines = [(each.getMessage(), fields_of(each)) for each in caplog.records]
    for line, fields in (each for each in lines if each[0].startswith("search: ")):
        assert fields["outbox_backend_id"] == "search"
        assert fields.keys() <= FIELDS
        if "attempt" in line:
            assert f"attempt {fields['outbox_attempt_id']}" in line
        if "failed" in line:
            assert fields["outbox_error_code"] == "42P01"
    assert_silent(caplog)


UNSEEN = "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F)]))
UNSEEN += "".join(map(chr, [0x2028, 0x2029, *range(0x2066, 0x206A), 0xD800, 0xDFFF]))
HOSTILE = f"a{UNSEEN}b\0\r\nc\x1b[31m" + "\N{MAN}\N{COMBINING ACUTE ACCENT}x" * 3_000_000

HOSTILE_ANSWERS: dict[str, Answer] = {
    "rejected": lambda batch: [Rejected(HOSTILE, HOSTILE) for _ in batch],
    "retry": lambda batch: [Retry(HOSTILE, HOSTILE) for _ in batch],
    "unavailable": raising(lambda _: Unavailable(HOSTILE, HOSTILE)),
}


@pytest.mark.parametrize("answer", HOSTILE_ANSWERS)
async def test_what_an_adapter_says_is_cleaned_cut_and_stored(
    primary: AsyncEngine, caplog: pytest.LogCaptureFixture, answer: str
) -> None:
    """F6: PostgreSQL refuses some of it, terminals obey some of it, and nobody wants ten megabytes of it."""
    manager = SyncManager(primary, [Faulty(HOSTILE_ANSWERS[answer])], config=HASTY)
    assert await carried(manager) == []
    async with primary.connect() as connection:
        codes = (await connection.execute(text("select distinct error_code from outbox_attempt"))).scalars().all()
        codes += (await connection.execute(text("select error_code from outbox_hold"))).scalars().all()
        errors = (await connection.execute(text("select error from outbox_hold"))).scalars().all()
    kept = [each for each in codes if each is not None]
    assert kept
    assert all(each.startswith("a") and len(each) <= 64 for each in kept)
    if answer != "unavailable":
        assert {len(each) for each in errors} == {1_024}
    said = [each.getMessage() for each in caplog.records if each.name == "outbox.relay"]
    assert bool(said) is (answer != "unavailable"), "keys died, and nobody said so"
    assert all(len(each) < 150 for each in said)
    for each in [*kept, *filter(None, errors), *said]:
        assert not set(each) & set(UNSEEN)


@pytest.mark.parametrize(
    "sloppy",
    [Rejected(404), Rejected("x", None), Rejected("x", ValueError(ERROR)), Retry(None), Retry("x", b"bytes")],
    ids=["number as code", "no problem", "error as problem", "no code", "bytes as problem"],
)
async def test_an_answer_with_a_field_of_another_type_is_an_outcome_too(primary: AsyncEngine, sloppy: Any) -> None:
    """F6: an adapter's slip in one answer must not end the loop of its secondary."""
    manager = SyncManager(primary, [Faulty(lambda batch: [sloppy for _ in batch])], config=HASTY)
    assert await carried(manager) == []
    assert len(await manager.failures()) == 3


async def _through_a_session(engine: AsyncEngine, event: SyncEvent) -> None:
    async with SyncManager(engine, config=HASTY).session() as session, session.begin():
        session.record(event)


async def _through_sqlalchemy(engine: AsyncEngine, event: SyncEvent) -> None:
    async with engine.begin() as connection:
        await record(connection, event)


async def _through_sqlalchemy_over_psycopg(engine: AsyncEngine, event: SyncEvent) -> None:
    other = create_engine(engine.url.set(drivername="postgresql+psycopg"), poolclass=NullPool)
    with other.begin() as connection:
        record(connection, event)


async def _through_asyncpg(engine: AsyncEngine, event: SyncEvent) -> None:
    connection = await asyncpg.connect(engine.url.set(drivername="postgresql").render_as_string(hide_password=False))
    try:
        async with connection.transaction():
            await record(connection, event)
    finally:
        await connection.close()


async def _through_psycopg(engine: AsyncEngine, event: SyncEvent) -> None:
    url = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(url) as connection:
        record(connection, event)


WAYS = [
    _through_a_session,
    _through_sqlalchemy,
    _through_sqlalchemy_over_psycopg,
    _through_asyncpg,
    _through_psycopg,
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken", ["alter table outbox rename to elsewhere", "drop table outbox_secondary cascade"])
async def test_an_event_that_cannot_be_recorded_is_not_quoted(
    primary: AsyncEngine, way: Callable[..., Any], broken: str
) -> None:
    """INVARIANTS 5.2 row 6: SQLAlchemy prints the parameters of a failed statement, and one of ours is the content."""
    async with primary.begin() as connection:
        await connection.execute(text(broken))
    with pytest.raises(Exception, match="outbox") as failure:
        await way(primary, SyncEvent.create("Note", IDENTITY, {"name": CONTENT}))
    assert CANARY not in "".join(traceback.format_exception(failure.value))
    assert CANARY not in repr(failure.value)


def test_a_refused_value_is_not_in_the_traceback_either() -> None:
    """The errors below it quote the value; what a log prints must stop before them."""
    bad = [{"a": f"{CONTENT}\ud800"}, f'{{"a": "{CONTENT}'.encode() + b"\xff", f'{{"a": {CONTENT}}}', {"a": {CONTENT}}]
    for content in bad:
        with pytest.raises(InvalidEvent) as refusal:
            SyncEvent.create("Note", "1", content)
        assert CANARY not in "".join(traceback.format_exception(refusal.value))


async def test_the_server_log_stays_silent_through_every_fault() -> None:
    """Promise 14: a statement of ours that fails would be in it, with its values."""

    class Note(declarative_base()):
        __tablename__ = "note"
        id = Column(Text, primary_key=True)

    with ExitStack() as running:
        try:
            server = running.enter_context(EmbeddedPostgres(settings={"fsync": "off", "log_min_messages": "debug1"}))
        except ServerMissing as missing:
            pytest.skip(str(missing))
        engine = create_async_engine(server.dsn(), poolclass=NullPool)
        await migrate(engine)
        for answer in [*(fault._answer for fault in FAULTS.values()), *HOSTILE_ANSWERS.values()]:
            await carried(SyncManager(engine, [Faulty(answer)], config=HASTY), batches=2)
        async with engine.begin() as connection:
            await connection.execute(text("do 'begin raise log ''the log is read''; end'"))
        log = (server.directory / "server.log").read_text(errors="replace")
    assert "the log is read" in log
    assert CANARY not in log
