"""The ledger of long runs, and the page that is made of it."""

from __future__ import annotations

import shutil
from pathlib import Path

from outbox.testing.checker import check
from outbox.testing.crash.ledger import Found, Ran, enter, ledger, ran, write_page
from outbox.testing.crash.plan import FAULTS
from outbox.testing.crash.terms import Terms
from outbox.testing.history import History, Recording
from outbox.testing.records import Applied, Asked, Ended, Entry, Fired, Recorded, Undone

ROOT = Path(__file__).parent.parent
RUN = Ran(
    date="2026-01-02",
    commit="abc1234",
    server="PostgreSQL 18",
    seed=7,
    hours=1.5,
    faults={"kill": 1200, "postgres": 30},
    transactions=4000,
    events=9000,
    calls=2500,
    states=17_000,
    records=40_000,
)


def test_the_page_is_what_the_ledger_says(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/reliability.jsonl", tmp_path)
    write_page(tmp_path / "reliability.jsonl")
    assert (tmp_path / "reliability.md").read_text() == (ROOT / "docs/reliability.md").read_text()


def test_what_is_entered_is_added_to_the_ledger_and_summed_up_on_its_page(tmp_path: Path) -> None:
    path = tmp_path / "reliability.jsonl"
    enter(path, RUN)
    enter(path, RUN)
    enter(path, Found(date="2026-01-03", seed=9, what="something was amiss.", mended="Mended."))
    assert len(ledger(path)) == 3
    page = path.with_suffix(".md").read_text()
    assert "| hours | 3.00 |" in page
    assert "| `kill` | 2,400 |" in page
    assert page.count("| 2026-01-02 | abc1234 | PostgreSQL 18 | 7 | 1.5 | 1,230 | 4,000 |") == 2
    assert "- 2026-01-03, seed 9: something was amiss. Mended." in page


def test_a_run_is_counted_from_its_history_and_judged_by_its_report(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    entries = [Entry(1, "acme", "Item", "a", "d"), Entry(2, "acme", "Item", "b", "d")]
    with History(path) as history:
        history.write(Fired(fault="kill anywhere"))
        history.write(Fired(fault="kill asked"))
        history.write(Asked(backend_id="index", call="1", entries=entries))
        history.write(Applied(backend_id="index", call="1", entries=entries))
        for name, how in (("t", "committed"), ("u", "rolled_back"), ("v", "unknown")):
            history.write(Recorded(transaction=name, entries=entries))
            history.write(Undone(transaction=name, positions=[2]))
            history.write(Ended(transaction=name, how=how))
    names = {"history_file": str(path), "directory": str(tmp_path)}
    terms = Terms(seed=7, seconds=5400, relays=1, writers=1, faults=tuple(FAULTS), **names)
    entry = ran(terms, check(Recording(path)), "PostgreSQL 18")
    assert entry.faults == {"kill": 2}
    assert (entry.hours, entry.transactions, entry.events, entry.calls, entry.states) == (1.5, 3, 1, 1, 2)
    assert entry.anomalies == [each.check for each in check(Recording(path)).verdicts if each.answer == "invalid"]
