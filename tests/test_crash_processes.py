"""The processes of the crash lab: who keeps a state keeps it as a real secondary does, and nobody outlives the lab."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest

from outbox.errors import Unavailable
from outbox.secondaries.base import Applied, Rejected, Retry, Stale
from outbox.testing.contract import SecondaryContract
from outbox.testing.crash import nemesis
from outbox.testing.crash.nemesis import Nemesis
from outbox.testing.crash.nursery import Nursery
from outbox.testing.crash.plan import FAULTS, Strike
from outbox.testing.crash.remote import RemoteSecondary
from outbox.testing.crash.shelf import serve
from outbox.testing.crash.terms import SPARED, Terms
from outbox.testing.crash.wire import Request, ask
from outbox.testing.history import History, Recording
from outbox.testing.postgres import EmbeddedPostgres
from outbox.testing.proxy import Proxy
from outbox.testing.records import Answered, Opened
from outbox.testing.records import Applied as Effect
from outbox.testing.states import write
from tests.waiting import eventually


@pytest.fixture
async def terms(directory: Path) -> AsyncIterator[Terms]:
    """The terms of a run of which only the secondaries are there."""
    names = {"history_file": str(directory / "history.jsonl"), "directory": str(directory)}
    terms = Terms(seed=1, seconds=1, relays=1, writers=1, faults=tuple(FAULTS), **names)
    serving = asyncio.create_task(serve(terms))
    await eventually(Path(terms.shelf).exists)
    yield terms
    serving.cancel()
    await asyncio.wait([serving])


@pytest.fixture
def secondary(terms: Terms) -> RemoteSecondary:
    return RemoteSecondary("index", terms.shelf, "relay-1")


class TestShelf(SecondaryContract):
    """O3, O4: what misbehaves on demand behaves when nobody demands it."""


async def misbehave(terms: Terms, fault: str, seconds: float = 0.01) -> None:
    await ask(terms.shelf, Request(asks="fault", backend_id="index", fault=fault, seconds=seconds))


def effects(terms: Terms) -> list[int]:
    """The positions that took effect, as the history has it."""
    found = (each for each in Recording(terms.history) if isinstance(each, Effect))
    return [entry.position for each in found for entry in each.entries]


def ends(terms: Terms) -> list[str]:
    """How the calls ended."""
    return [each.how for each in Recording(terms.history) if isinstance(each, Answered)]


@pytest.mark.parametrize(("fault", "kept", "end"), [("mute", [1], "cut"), ("hung", [], "cut"), ("down", [], "")])
async def test_an_answer_that_never_comes_says_nothing_of_what_was_done(
    terms: Terms, secondary: RemoteSecondary, fault: str, kept: list[int], end: str
) -> None:
    """3.5: applied and not answered, neither, and not even asked."""
    await misbehave(terms, fault)
    calling = asyncio.create_task(secondary.apply([write("a", 1)]))
    if fault == "hung":
        done, _ = await asyncio.wait([calling], timeout=0.1)
        assert not done
        await misbehave(terms, "")
    with pytest.raises(Unavailable):
        await calling
    assert effects(terms) == kept
    assert ends(terms) == ([end] if end else [])


async def test_a_busy_secondary_says_when_to_come_again(terms: Terms, secondary: RemoteSecondary) -> None:
    await misbehave(terms, "throttled", 0.25)
    with pytest.raises(Unavailable) as refused:
        await secondary.apply([write("a", 1)])
    assert refused.value.retry_after is not None
    assert refused.value.retry_after.total_seconds() == 0.25
    assert effects(terms) == []


async def test_a_batch_may_be_taken_in_part_or_answered_short(terms: Terms, secondary: RemoteSecondary) -> None:
    """F3."""
    await misbehave(terms, "partly")
    assert await secondary.apply([write("a", 1), write("b", 2)]) == [Applied(), Retry("busy")]
    await misbehave(terms, "short")
    assert await secondary.apply([write("a", 1), write("b", 2)]) == [Stale()]
    assert effects(terms) == [1, 2]


async def test_poison_is_never_taken(terms: Terms, secondary: RemoteSecondary) -> None:
    """F1."""
    assert await secondary.apply([write("a", 1, '{"poison":true}')]) == [Rejected("poison")]
    assert effects(terms) == []


async def test_a_call_whose_caller_is_gone_still_takes_effect(terms: Terms, secondary: RemoteSecondary) -> None:
    """L4: the late write of a relay that lost its lease."""
    await misbehave(terms, "late", 0.2)
    calling = asyncio.create_task(secondary.apply([write("a", 1)]))
    await asyncio.wait([calling], timeout=0.05)
    calling.cancel()
    await eventually(lambda: effects(terms) == [1])
    await eventually(lambda: ends(terms) == ["abandoned"])


async def test_who_is_spared_meets_no_ambush_and_hands_over_what_is_deadly_to_others(terms: Terms) -> None:
    """What a relay holds over time can only be seen of one that lives."""
    spared = RemoteSecondary("index", terms.shelf, f"{SPARED}-1")
    ambush = asyncio.create_task(
        ask(terms.shelf, Request(asks="ambush", backend_id="index", fault="asked", seconds=0.5))
    )
    await eventually(partial(lies_in_wait, terms, "asked"))
    assert await spared.apply([write("a", 1)]) == [Applied()]
    assert (await ambush)["caller"] == ""
    with pytest.raises(RuntimeError):
        await spared.apply([write("a", 2, '{"deadly":true}')])


async def lies_in_wait(terms: Terms, point: str) -> bool:
    return point in (await ask(terms.shelf, Request(asks="check", backend_id="index")))["waiting"]


async def test_who_lies_in_wait_catches_the_next_call_and_holds_it(terms: Terms, secondary: RemoteSecondary) -> None:
    """D1: asked and not yet done, done and not yet answered."""
    for number, (point, kept) in enumerate((("asked", []), ("applied", [1, 2])), 1):
        waiting = Request(asks="ambush", backend_id="index", fault=point, seconds=20)
        ambush = asyncio.create_task(ask(terms.shelf, waiting))
        await eventually(partial(lies_in_wait, terms, point))
        calling = asyncio.create_task(secondary.apply([write(f"r{number}", number)]))
        caught = await ambush
        assert caught["caller"] == "relay-1"
        assert not calling.done()
        assert effects(terms) == kept
        await ask(terms.shelf, Request(asks="release", backend_id="index", number=caught["number"]))
        assert await calling == [Applied()]


# A server of its own and a process that imports everything come first.
_SLOW = timedelta(seconds=120)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_nobody_outlives_the_lab(directory: Path) -> None:
    """However it ends: relays, writers, secondaries and the primary."""
    history = directory / "history.jsonl"
    arguments = ["--seconds", "60", "--faults", "", "--history", str(history)]
    # What a killed process leaves behind goes with the directory.
    environment = os.environ | {"TMPDIR": str(directory)}
    command = [sys.executable, "-m", "outbox.testing.crash", *arguments]
    lab = await asyncio.create_subprocess_exec(*command, env=environment)
    try:
        await eventually(lambda: {"relay", "writer", "secondary"} <= {each.role for each in opened(history)}, _SLOW)
    finally:
        lab.send_signal(signal.SIGKILL)
        await lab.wait()
    pids = {each.pid for each in opened(history)}
    assert len(pids) >= 4
    await eventually(lambda: all(map(gone, pids)))
    await eventually(lambda: not list(directory.glob("outbox-postgres-*/postmaster.pid")))


async def test_who_does_not_end_when_told_to_is_named_and_killed(directory: Path) -> None:
    async with Nursery(bare(directory)) as nursery:
        nursery.start("shelf", "shelf-1")
        nursery.start("shelf", "shelf-2")
        await eventually(lambda: len(opened(directory / "history.jsonl")) >= 4)
        nursery.signal("shelf-2", signal.SIGSTOP)
        await nursery.stop(["shelf-1", "shelf-2"], 1.0)
        assert nursery.stuck == ["shelf-2"]
        assert {name for name, _ in nursery.ended} == {"shelf-1", "shelf-2"}
        assert ("shelf-2", -signal.SIGKILL) in nursery.ended


async def test_a_process_says_what_it_is_at(directory: Path) -> None:
    terms = bare(directory)
    async with Nursery(terms) as nursery:
        nursery.start("shelf", "shelf-1")
        await eventually(lambda: opened(directory / "history.jsonl"))
        nursery.signal("shelf-1", signal.SIGUSR1)
        await eventually(lambda: "server.serve_forever" in terms.log.read_text())


async def test_a_strike_that_never_ends_is_named_and_left(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setitem(Nemesis.WAYS, "kill", never)
    monkeypatch.setattr(nemesis, "_LONGEST", 0.05)
    terms = bare(directory)
    with History(terms.history) as history:
        striking = Nemesis(terms, Nursery(terms), EmbeddedPostgres(), Proxy(0, {}), history)
        # A round takes its own time, and not that of the whole run.
        await asyncio.wait_for(striking.carry_out([Strike(0, "kill", "anywhere", 0, 0)], 0.1), timeout=20)
    assert striking.stuck == ["kill anywhere"]


def bare(directory: Path) -> Terms:
    """The terms of a run without a primary."""
    names = {"history_file": str(directory / "history.jsonl"), "directory": str(directory)}
    return Terms(
        seed=1, seconds=600, relays=1, writers=1, faults=(), dsn="postgresql+asyncpg://nobody@127.0.0.1:1/none", **names
    )


def opened(history: Path) -> list[Opened]:
    if not history.exists():
        return []
    return [each for each in Recording(history) if isinstance(each, Opened)]
