"""`outbox doctor`: what people and programs are shown, what scripts are told, and the way back after a restore."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.test_cli import PASSWORD, execute, outbox, process

SECONDARY = '[outbox]\nunhealthy_after_silence = "off"\nunhealthy_lag = "off"\n[secondaries.copy]\ntype = "sql"\nurl = "sqlite+aiosqlite:///{}"\n'
WRITE = """
with event as (
    insert into outbox (tenant_id, resource_type, resource_id, operation, content)
    select 'default', 'Thing', cast(n as text), 'create', json_build_object('n', n)
    from generate_series(1, {}) as n returning event_id, resource_id
)
insert into outbox_delivery (backend_id, lane, event_id, key_hash)
select 'copy', hashtextextended('default', 0) & 63, event_id, hashtextextended('default/Thing/' || resource_id, 0)
from event
"""


@pytest.fixture
def place(primary: AsyncEngine, tmp_path: Path) -> tuple[str, Path]:
    """The primary's address, with a password that must never be shown, and a file that describes a manager."""
    dsn = primary.url.set(password=primary.url.password or PASSWORD).render_as_string(hide_password=False)
    config = tmp_path / "outbox.toml"
    config.write_text(SECONDARY.format(tmp_path / "copy.db"))
    assert process("relay", "--drain", "--config", config, OUTBOX_DSN=dsn).status == 0
    return dsn, config


def test_a_program_gets_every_finding_and_a_script_the_verdict(place: tuple[str, Path]) -> None:
    dsn, config = place
    done = outbox("doctor", "--json", "--config", config, OUTBOX_DSN=dsn)
    assert (done.status, done.document["ok"]) == (0, True), done.output
    findings = {each["name"]: each for each in done.document["findings"]}
    assert findings["schema"].keys() == {"name", "verdict", "found", "advice"}
    assert {"primary", "privileges", "registry", "reachable", "ahead", "history"} < findings.keys()
    execute(dsn, "alter table outbox_hold set unlogged")
    done = outbox("doctor", "--json", "--config", config, OUTBOX_DSN=dsn)
    assert (done.status, done.document["ok"]) == (1, False)


def test_a_person_is_told_what_to_do_next(place: tuple[str, Path]) -> None:
    dsn, config = place
    execute(dsn, "alter table outbox_hold set unlogged")
    done = outbox("doctor", "--config", config, OUTBOX_DSN=dsn)
    lines = done.output.splitlines()
    (line,) = [line for line in lines if "persistence" in line]
    assert "wrong" in line
    assert "set logged" in line
    assert all(lines.index(line) < place for place, other in enumerate(lines) if " ok " in other), "the worst is first"
    assert lines[-1].startswith("1 wrong, ")


def test_an_address_alone_is_enough_for_the_primary_s_side(place: tuple[str, Path]) -> None:
    done = outbox("doctor", "--json", "--dsn", place[0])
    assert (done.status, done.document["ok"]) == (0, True)
    verdicts = {each["name"]: each["verdict"] for each in done.document["findings"]}
    assert (verdicts["registry"], verdicts["sequence"]) == ("unknown", "ok")


def test_a_primary_that_does_not_answer_is_wrong_and_no_address_is_another_matter() -> None:
    done = outbox("doctor", "--json", "--dsn", f"postgresql://doctor:{PASSWORD}@127.0.0.1:1/none")
    assert (done.status, [each["name"] for each in done.document["findings"]]) == (1, ["primary"])
    assert outbox("doctor").status == 2


def test_after_a_restore_it_says_so_moves_positions_and_names_what_to_reconcile(place: tuple[str, Path]) -> None:
    """C4, by the command line alone."""
    dsn, config = place
    execute(dsn, WRITE.format(20))
    assert process("relay", "--drain", "--config", config, OUTBOX_DSN=dsn).status == 0
    execute(dsn, "delete from outbox where event_id > 5")
    execute(dsn, "select setval('outbox_event_id_seq', 5)")
    told = outbox("doctor", "--config", config, OUTBOX_DSN=dsn)
    assert told.status == 1
    assert "outbox doctor --repair" in told.output
    execute(dsn, WRITE.format(1))
    assert process("relay", "--drain", "--config", config, OUTBOX_DSN=dsn).status == 0
    assert execute(dsn, "select pending from outbox_lag") == [(1,)]
    moved = outbox("doctor", "--repair", "--config", config, OUTBOX_DSN=dsn)
    assert moved.status == 0, moved.output
    assert "moved positions from 6 to 21" in moved.output
    assert "recorded again, above all that they hold: 1 event" in moved.output
    assert "outbox reconcile copy --repair" in moved.output
    again = outbox("doctor", "--repair", "--json", "--config", config, OUTBOX_DSN=dsn)
    assert (again.document["moved"]["before"], again.document["moved"]["after"]) == (21, 21)
    execute(dsn, WRITE.format(3))
    assert process("relay", "--drain", "--config", config, OUTBOX_DSN=dsn).status == 0
    with closing(sqlite3.connect(config.parent / "copy.db")) as copy:
        assert copy.execute("select max(position) from outbox_resources").fetchall() == [(24,)]
