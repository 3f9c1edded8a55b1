"""Guarantee 11: a row that no event can carry differs, is counted, and keeps nothing else from being restored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from msgspec.structs import replace
from sqlalchemy import JSON, Column, Float, Text, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.orm import declarative_base

from outbox import MemorySecondary, NotForgotten, SyncEvent, SyncManager
from outbox.content import Limits
from outbox.secondaries.sql import SqlSecondary
from tests.comparing import said
from tests.guarantees.test_11_listing_order import Plain
from tests.relaying import execute, manager_of, running, value
from tests.test_backfill_command import App, app
from tests.waiting import eventually

__all__ = ["app"]

BAD: dict[str, str | None] = {
    "nothing": None,
    "a key twice": '{"word":"one","word":"two"}',
    "too large": said("x" * 3_000),
    "no JSON": '{"word":',
    "no number": '{"word":NaN}',
    "no exponent": '{"word":1e99999999999999999999}',
    "a half": '{"word":"\\ud800"}',
    "no object": "[]",
}


def note_of(content: Any = Text) -> Any:
    columns = {"name": Column(Text(collation="C"), primary_key=True), "content": Column(content)}
    return type("Note", (declarative_base(),), {"__tablename__": "odd", **columns})


async def noted(engine: AsyncEngine, secondary: Any, rows: dict[str, str | None], *, summed: bool) -> SyncManager:
    """A manager that tracks notes, of which no session has seen one."""
    note = note_of()
    async with engine.begin() as connection:
        await connection.run_sync(note.metadata.create_all)
        values = [{"name": name, "content": content} for name, content in rows.items()]
        await connection.execute(sa.insert(note.__table__), values)
    manager = manager_of(engine, secondary)
    content: Any = note.content if summed else lambda row: row.content
    manager.track(note, resource_id=note.name, content=content, limits=Limits(content_bytes=2_000, id_bytes=1_000))
    await manager.register()
    return manager


def invented(secondary: MemorySecondary, name: str, content: str) -> None:
    event = replace(SyncEvent.create("Note", "x", said("nobody's")), resource_id=name, content=content, position=1)
    secondary.held[event.key] = event


@pytest.mark.parametrize("how", ["by sums", "by pages", "merged"])
async def test_it_is_counted_and_everything_else_is_restored(primary: AsyncEngine, how: str) -> None:
    """What comes after it in the walk is restored, what is extra is removed, and a note is written."""
    plain = Plain()
    secondary = plain.inner
    rows = {f"{name} {letter}": said("first") for name in BAD for letter in "az"}
    manager = await noted(primary, plain if how == "merged" else secondary, BAD | rows, summed=how == "by sums")
    for name in ("alone", "zero"):
        invented(secondary, name, said("nobody's"))
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.extra, found.repaired) == (len(BAD) + len(rows), 2, len(rows) + 2)
    assert (found.uncarried, found.refused, found.in_sync) == (len(BAD), 0, False)
    assert await value(primary, "select missing - repaired from outbox_reconciliation") == len(BAD) - 2
    await manager.relay().drain()
    assert {key[2] for key, event in secondary.held.items() if event.content is not None} == set(rows)
    again = await manager.reconcile("mirror", repair=True)
    assert (again.missing, again.extra, again.altered, again.uncarried) == (len(BAD), 0, 0, len(BAD))
    assert {drift.resource_id for drift in again.samples} == set(BAD)


@pytest.mark.parametrize("summed", [True, False])
async def test_what_is_damaged_on_both_sides_is_not_equal(primary: AsyncEngine, tmp_path: Path, summed: bool) -> None:
    """Neither has a digest; two that have none are not the same."""
    url = f"sqlite+aiosqlite:///{tmp_path}/copy.db"
    copy = SqlSecondary("copy", url, "copies")
    manager = await noted(primary, copy, {"1": said("first"), "2": said("first")}, summed=summed)
    await manager.backfill("copy", most_owed=None)
    await manager.relay().drain()
    assert (await manager.reconcile("copy")).in_sync
    theirs = create_async_engine(url)
    for damaged, copied in (("{", ""), (None, ""), (None, "null")):
        await execute(theirs, "update copies set content = :copied where resource_id = '2'", copied=copied)
        await execute(primary, "update odd set content = :damaged where name = '2'", damaged=damaged)
        found = await manager.reconcile("copy", repair=True)
        assert (found.altered + found.stale, found.missing, found.uncarried) == (1, 0, 1)
    await theirs.dispose()
    await copy.aclose()


@pytest.mark.parametrize("kind", ["no number", "half a letter"])
async def test_what_only_the_objects_hold_ends_no_comparison(primary: AsyncEngine, kind: str) -> None:
    """A NaN, and half of a letter that JSON may hold and no text can: `add` ends, and says that it is not equal."""
    note: Any = note_of(Float if kind == "no number" else JSON)
    odd, fine = ("nan", "1.5") if kind == "no number" else ('"\\ud800"', '"a"')
    async with primary.begin() as connection:
        await connection.run_sync(note.metadata.create_all)
        await connection.execute(text(f"insert into odd values ('1', '{fine}'), ('2', '{odd}'), ('3', '{fine}')"))
    secondary = MemorySecondary("mirror")
    manager = manager_of(primary, secondary)
    manager.track(note)
    added = await manager.add("mirror")
    assert (added.equal, added.status) == (False, "shadow")
    assert (added.proof.missing, added.proof.repaired, added.proof.uncarried) == (1, 0, 1)
    assert sorted(key[2] for key in secondary.held) == ["1", "3"]


async def test_what_no_event_can_name_is_left_alone_and_the_rest_is_removed(primary: AsyncEngine) -> None:
    """Somebody put it there under a name that no delete can have; how long one may be is what the class says."""
    secondary = MemorySecondary("mirror")
    manager = await noted(primary, secondary, {"1": said("first")}, summed=True)
    for name in ("a\tb", "b" * 1_001, "c" * 1_000, "d"):
        invented(secondary, name, said("nobody's"))
    found = await manager.reconcile("mirror", repair=True)
    assert (found.missing, found.extra, found.repaired, found.uncarried) == (1, 4, 3, 2)
    await manager.relay().drain()
    again = await manager.reconcile("mirror")
    assert (again.extra, again.missing) == (2, 0)


@pytest.mark.parametrize("name", BAD)
async def test_it_is_there_to_whoever_asks_about_it(primary: AsyncEngine, name: str) -> None:
    """`why` says that the two differ, and `forget` erases nothing while the primary has it."""
    manager = await noted(primary, MemorySecondary("mirror"), BAD, summed=True)
    story = await manager.why("Note", name)
    assert (story.primary.present, story.secondaries[0].copy.equal) == (True, False)
    with pytest.raises(NotForgotten):
        await manager.forget("Note", name)


async def test_the_continuous_proof_comes_to_its_end(primary: AsyncEngine) -> None:
    """Also where somebody wrote what is no JSON past every session."""
    manager = await noted(primary, MemorySecondary("mirror"), BAD, summed=True)
    proving = manager_of(primary, *manager.registrations, proof_interval=0.2, proof_share=1.0)
    proving.tracking._tracked = manager.tracking._tracked
    async with running(proving.relay()):
        await eventually(lambda: value(primary, "select count(*) > 0 from outbox_reconciliation"))
    assert await value(primary, "select min(missing) from outbox_reconciliation") == len(BAD)


def test_the_command_says_so_and_ends_with_status_1(app: App) -> None:
    """What it repaired is not all that differed."""
    app.execute("insert into patient values (2 + 2, 'nan')")
    done = app.run("reconcile", "copy", "--repair", "--json")
    assert done.returncode == 1, done.stderr
    assert '"uncarried": 1' in done.stdout
    assert "1 of what differs no event can carry" in done.stderr
