"""Docs are executed: the README's code and commands run as a newcomer would run them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from tests.conftest import PostgresServer, new_database

ROOT = Path(__file__).parent.parent
OUTBOX = (sys.executable, "-m", "outbox.cli")

USE = """
import asyncio
from app import *

async def main() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await manager.register()
    await admit("7", "Chalmers")
    await admit("8", "Windsor")
    await discharge("8")
    async with engine.begin() as connection:
        await without_an_orm(connection)
    await behind()
    await manager.relay().drain()
    print("equal:", await equal())
    print("cached:", await manager.registrations[0].secondary.content_of("Patient", "7"))
    print("gone:", await manager.registrations[0].secondary.content_of("Patient", "8"))
    await manager.aclose()
    await engine.dispose()

asyncio.run(main())
"""


def blocks(document: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [block for named, block in fenced if named == language]


@pytest.fixture
def application(tmp_path: Path, postgres: PostgresServer, valkey_url: str):
    """The README's app.py, and an environment in which it runs on an empty database."""
    (tmp_path / "app.py").write_text("\n".join(blocks("README.md", "python")))
    (tmp_path / "use.py").write_text(USE)
    with new_database(postgres) as name:
        yield tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name), "VALKEY_URL": valkey_url}


def run(application: tuple[Path, dict[str, str]], *command: str) -> str:
    directory, environment = application
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_readme_s_application_relays_a_change_and_says_that_both_sides_are_equal(application) -> None:
    run(application, *OUTBOX, "migrate", "--dsn", application[1]["OUTBOX_DSN"])
    printed = run(application, sys.executable, "use.py")
    assert "cache 4 " in printed or "cache 5 " in printed
    assert "equal: True" in printed
    assert 'cached: {"id":"7","family":"Chalmers"}' in printed
    assert "gone: None" in printed
    run(application, *OUTBOX, "relay", "--app", "app:manager", "--drain")
    assert "cache" in run(application, *OUTBOX, "status", "--app", "app:manager")
    [query] = blocks("README.md", "sql")
    with psycopg.connect(application[1]["OUTBOX_DSN"].replace("+asyncpg", "")) as connection:
        assert [row[0] for row in connection.execute(query.encode())] == ["cache"]


def test_the_quickstart_is_as_short_as_it_claims() -> None:
    added = [line for line in blocks("README.md", "python")[1].splitlines() if line.strip()]
    assert len(added) <= 10
    commands = next(block for block in blocks("README.md", "") if "pip install" in block)
    assert len(commands.strip().splitlines()) <= 3


def test_the_migrations_page_s_code_runs(tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text("\n".join(blocks("docs/migrations.md", "python")))
    done = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert list(Path(done.stdout.strip()).glob("*.py"))


def test_the_tracing_page_s_code_runs_and_prints_what_it_says(tmp_path: Path, postgres: PostgresServer) -> None:
    """D67."""
    (tmp_path / "page.py").write_text("\n".join(blocks("docs/tracing.md", "python")))
    with new_database(postgres) as name:
        application = tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name)}
        run(application, *OUTBOX, "migrate", "--dsn", postgres.dsn(name))
        printed = run(application, sys.executable, "page.py").splitlines()
    assert printed == [
        "('default', 'Ward', '3') importer ward.csv",
        "('default', 'Ward', '4') Dr Zo\u00eb ward.csv",
        "outbox.dispatch {'outbox.backend_id': 'cache', 'outbox.events': 2, 'outbox.applied': 2}",
        "linked: True",
    ]


def test_the_modes_page_s_code_runs_and_says_what_it_promises(tmp_path: Path, postgres: PostgresServer) -> None:
    """D53, D54: the states that the page tells of are those a user meets."""
    code = "\n".join(blocks("docs/modes.md", "python"))
    (tmp_path / "page.py").write_text(code.replace("timeout=2.0", "timeout=0.1"))
    with new_database(postgres) as name:
        application = tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name)}
        run(application, *OUTBOX, "migrate", "--dsn", postgres.dsn(name))
        printed = run(application, sys.executable, "page.py").splitlines()
    assert printed == [
        "archive accepted",
        "index applied",
        "read from the primary, because the index says timed_out",
        "and later from index",
        "then from the index",
    ]


def test_the_secondaries_page_s_store_is_one(tmp_path: Path, postgres: PostgresServer) -> None:
    *page, suite = blocks("docs/secondaries.md", "python")
    [upsert] = blocks("docs/secondaries.md", "sql")
    assert upsert in (ROOT / "examples/sqlite_storage.py").read_text()
    (tmp_path / "page.py").write_text("\n".join(page))
    (tmp_path / "test_notes.py").write_text(suite)
    with new_database(postgres) as name:
        environment = os.environ | {"OUTBOX_DSN": postgres.dsn(name), "PYTHONPATH": str(ROOT / "examples")}
        there = tmp_path, environment
        run(there, *OUTBOX, "migrate", "--dsn", environment["OUTBOX_DSN"])
        printed = run(there, sys.executable, "page.py")
    assert "Ada was here" in printed
    assert "position=1" in printed
    assert " passed" in run(there, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_notes.py")


PROVE = """
import asyncio
from page import *

async def main() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await manager.register()
    async with manager.session() as session, session.begin():
        session.add_all([Patient(id=str(n), tenant="north", resource='{"n": %d}' % n) for n in range(3)])
    await manager.relay().drain()
    del manager.registrations[0].secondary.held["north", "Patient", "1"]
    await prove()
    await restore()
    await manager.relay().drain()
    await prove()
    await engine.dispose()

asyncio.run(main())
"""


def test_the_proof_page_s_code_proves_and_restores_and_its_sql_tells_who(
    tmp_path: Path, postgres: PostgresServer
) -> None:
    (tmp_path / "page.py").write_text("\n".join(blocks("docs/proof.md", "python")))
    (tmp_path / "use.py").write_text(PROVE)
    who, proofs = blocks("docs/proof.md", "sql")
    with new_database(postgres) as name:
        there = tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name)}
        run(there, *OUTBOX, "migrate", "--dsn", postgres.dsn(name))
        printed = run(there, sys.executable, "use.py").splitlines()
        with psycopg.connect(postgres.dsn(name, "postgresql")) as connection:
            repairs = [row for row in connection.execute(who).fetchall() if row[-1]]
            compared = connection.execute(proofs).fetchall()
    equal, lost = "0 missing, 0 extra, 0 stale, 0 altered", "1 missing, 0 extra, 0 stale, 0 altered"
    assert printed == [lost, "1 repaired", equal]
    assert [row[1:3] for row in repairs] == [("ada", "disk failure on the 14th")]
    assert [row[3] for row in compared] == [0, 1, 1]


def test_the_lifecycle_page_s_code_runs_and_prints_what_it_says(tmp_path: Path, postgres: PostgresServer) -> None:
    """D7."""
    (tmp_path / "page.py").write_text("\n".join(blocks("docs/secondaries-lifecycle.md", "python")))
    [said] = blocks("docs/secondaries-lifecycle.md", "text")
    with new_database(postgres) as name:
        application = tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name)}
        run(application, *OUTBOX, "migrate", "--dsn", postgres.dsn(name))
        assert run(application, sys.executable, "page.py") == said


def test_the_backfill_page_s_code_runs_and_ends_equal(tmp_path: Path, postgres: PostgresServer) -> None:
    """K3."""
    (tmp_path / "page.py").write_text("\n".join(blocks("docs/backfill.md", "python")))
    with new_database(postgres) as name:
        application = tmp_path, os.environ | {"OUTBOX_DSN": postgres.dsn(name)}
        run(application, *OUTBOX, "migrate", "--dsn", postgres.dsn(name))
        printed = run(application, sys.executable, "page.py").splitlines()
    assert printed == ["1000 to record", "1000 recorded, finished: True", "equal: True"]


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for document in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name} links to {link}"
