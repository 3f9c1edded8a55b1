"""`outbox why` and `outbox forget`, as a person and a program meet them, and what docs/operating.md says of them."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import AsyncIterator
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any
from uuid import uuid4

import pytest
from relaying import dsn_of, everything
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.test_cli import Done, outbox
from tests.test_docs import blocks

APP = """
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from outbox import SyncConfig, SyncManager
from outbox.secondaries.sql import SqlSecondary

class Base(DeclarativeBase): ...

class Patient(Base):
    __tablename__ = "patient"
    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]

manager = SyncManager(create_async_engine("{dsn}"), [SqlSecondary("copy", "sqlite+aiosqlite:///{copy}")])
manager.track(Patient, resource_id=Patient.id)
"""


class Folder:
    """A folder with an application, which has written patients 7 and 8 and deleted 8."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = f"app_{uuid4().hex}"

    def anew(self) -> ModuleType:
        """The application as a new process would have it."""
        sys.modules.pop(self.name, None)
        return import_module(self.name)

    def run(self, *arguments: str) -> Done:
        self.anew()
        return outbox(*arguments, "--app", f"{self.name}:manager")


@pytest.fixture
async def folder(primary: AsyncEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Folder]:
    folder = Folder(tmp_path)
    (tmp_path / f"{folder.name}.py").write_text(APP.format(dsn=dsn_of(primary), copy=tmp_path / "copy.db"))
    monkeypatch.syspath_prepend(tmp_path)
    app = folder.anew()
    async with primary.begin() as connection:
        await connection.run_sync(app.Base.metadata.create_all)
    await app.manager.register()
    async with app.manager.session(actor="Dr Zoe") as session, session.begin():
        session.add_all([app.Patient(id="7", name="Chalmers"), app.Patient(id="8", name="canary-88")])
    async with app.manager.session() as session, session.begin():
        await session.delete(await session.get(app.Patient, "8"))
    await app.manager.relay().drain()
    await closed(app)
    yield folder
    sys.modules.pop(folder.name, None)


async def closed(app: Any) -> None:
    await app.manager.aclose()
    await app.manager.engine.dispose()


async def test_why_tells_people_a_story_and_programs_all_of_it(folder: Folder) -> None:
    done = folder.run("why", "Patient/7")
    assert done.status == 0, done.errors
    assert re.match(r"Patient/7 of tenant default, at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC *\n", done.output)
    assert re.search(r"The primary has it, digest [0-9a-f]{8}\. *\nEvents kept: 1\. *\n", done.output)
    assert "copy (live): has it from position 1, as the primary" in done.output
    assert "It waits for nothing: it is in step." in done.output
    assert "Dr Zoe" in done.output
    assert "Chalmers" not in done.output
    document = folder.run("why", "Patient/7", "--json").document
    assert document["in_step"] is True
    [copy] = document["secondaries"]
    assert copy["waits_for"] == "nothing: it is in step"
    assert copy["attempts"][0]["positions"] == [1]
    assert document["events"][0]["actor"] == "Dr Zoe"


async def test_why_ends_with_1_when_something_is_not_in_step_or_cannot_be_asked(
    folder: Folder, primary: AsyncEngine
) -> None:
    (folder.path / "copy.db").unlink()
    done = folder.run("why", "Patient/7")
    assert done.status == 1
    assert "It waits for nothing, though it differs: outbox reconcile copy --repair restores it." in done.output
    done = outbox("why", "Patient/7", "--dsn", dsn_of(primary))
    assert done.status == 1
    assert "this process does not have its adapter" in done.output


@pytest.mark.parametrize("resource", ["Patient", "/7", "Patient/"])
async def test_what_is_no_resource_is_refused(folder: Folder, resource: str) -> None:
    done = folder.run("why", resource)
    assert (done.status, done.errors) == (2, f"outbox: {resource}: must be TYPE/ID, such as Patient/123\n")


async def test_forget_asks_erases_and_shows_its_evidence(
    folder: Folder, primary: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await everything(primary)
    monkeypatch.setattr(sys, "stdin", io.StringIO("n\n"))
    done = folder.run("forget", "Patient/8")
    assert done.status == 1
    assert "Erase Patient/8 of tenant default everywhere, for good?" in done.errors
    assert await everything(primary) == before
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    done = folder.run("forget", "Patient/8")
    assert done.status == 0, done.output + done.errors
    assert "Patient/8 of tenant default was erased, by the delete at position 4." in done.output
    assert "Scrubbed 1 events, 0 failures and 0 notes" in done.output
    assert "canary-88" not in json.dumps(await everything(primary))
    document = folder.run("forget", "Patient/8", "--yes", "--json").document
    assert document["complete"] is True
    assert document["secondaries"][0]["absent"] is True


async def test_a_dry_run_changes_nothing_and_a_refusal_ends_with_2(folder: Folder, primary: AsyncEngine) -> None:
    before = await everything(primary)
    done = folder.run("forget", "Patient/8", "--dry-run")
    assert done.status == 0
    assert "Patient/8 of tenant default would be erased: 1 of its events hold content or headers." in done.output
    done = folder.run("forget", "Patient/7", "--yes")
    assert done.status == 2
    assert done.errors == (
        "outbox: the primary still has it: delete it first, through a session that records the delete\n"
    )
    assert await everything(primary) == before


async def test_what_is_not_proved_ends_with_1(folder: Folder) -> None:
    folder.run("pause", "copy")
    done = folder.run("forget", "Patient/8", "--yes", "--timeout", "1")
    assert done.status == 1
    assert "Not proved: copy: the delete has not arrived (paused)" in done.output


async def test_the_operating_page_s_code_and_commands_do_what_they_say(folder: Folder) -> None:
    [page] = [block for block in blocks("docs/operating.md", "python") if "manager.why" in block]
    app = folder.anew()
    names: dict[str, Any] = {"manager": app.manager}
    exec(f"async def page():\n{indent(page, '    ')}", names)
    with redirect_stdout(io.StringIO()) as printed:
        await names["page"]()
    await closed(app)
    assert printed.getvalue() == "copy: nothing: it is in step\nerased\n"
    commands = [
        line.split()[1:]
        for block in blocks("docs/operating.md", "sh")
        for line in block.splitlines()
        if line.startswith(("outbox why", "outbox forget"))
    ]
    assert [command[0] for command in commands] == ["why", "forget"]
    for *command, _, _ in (list(_apart(command)) for command in commands):
        assert (done := folder.run(*command)).status == 0, done.output + done.errors


def _apart(command: list[str]) -> list[str]:
    """The arguments with `--app app:manager` at the end."""
    at = command.index("--app")
    return [*command[:at], *command[at + 2 :], *command[at : at + 2]]
