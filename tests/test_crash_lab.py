"""The crash lab: a run of faults by the seed, and a history without an anomaly at its end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from msgspec.structs import replace

from outbox.testing.checker import Report
from outbox.testing.checks.verdict import Answer, Verdict
from outbox.testing.crash.__main__ import failed
from outbox.testing.crash.measure import flat
from outbox.testing.crash.nemesis import Nemesis
from outbox.testing.crash.numbers import NUMBERS, reached, short, table
from outbox.testing.crash.plan import FAULTS, plan
from outbox.testing.crash.terms import Terms
from outbox.testing.history import Recording
from outbox.testing.records import Did, Ended, Entry, Fired, Measured, Promised, Record, Recorded, Undone

pytestmark = pytest.mark.long

SECONDS = float(os.environ.get("OUTBOX_TEST_CRASH_SECONDS", "60"))
SEED = int(os.environ.get("OUTBOX_TEST_CRASH_SEED") or secrets.randbelow(1_000_000))
TERMS = Terms(seed=7, seconds=600, relays=3, writers=2, faults=tuple(FAULTS), history_file="", directory="")


def test_the_same_seed_strikes_the_same_blows() -> None:
    assert plan(TERMS) == plan(replace(TERMS, relays=5, writers=1))
    assert plan(TERMS) != plan(replace(TERMS, seed=8))


def test_one_kind_of_fault_more_moves_no_other() -> None:
    only_kills = plan(replace(TERMS, faults=("kill",)))
    assert only_kills == [strike for strike in plan(TERMS) if strike.fault == "kill"]


def test_every_kind_of_fault_strikes_in_every_way_it_has() -> None:
    struck = {(strike.fault, strike.how) for strike in plan(TERMS)}
    assert struck == {(fault, how) for fault, kind in FAULTS.items() if kind.per_second for how in kind.ways}
    assert {fault for fault, _ in struck} == set(Nemesis.WAYS)


@pytest.mark.parametrize("name", sorted(NUMBERS))
def test_as_much_is_planned_as_is_asked_for_and_more(name: str) -> None:
    numbers = NUMBERS[name]
    strikes = plan(replace(TERMS, seconds=numbers.seconds, numbers=numbers))
    planned = Counter(strike.fault for strike in strikes)
    at_commit = sum(strike.fault == "cut" and strike.stage == "commit" for strike in strikes)
    asked = numbers.asked
    assert planned["kill"] >= 1.1 * asked["relay kills"]
    assert planned["postgres"] >= 1.1 * asked["PostgreSQL crashes"]
    assert planned["stop"] >= 1.1 * asked["zombie resumes"]
    assert planned["cut"] >= 1.1 * asked["connections cut"]
    assert at_commit >= 1.1 * asked["of them at COMMIT"]


def test_a_shorter_run_owes_its_share_and_at_least_one_of_each() -> None:
    asked = NUMBERS["ci"].within(60)
    assert (asked["relay kills"], asked["PostgreSQL crashes"], asked["events"]) == (200, 5, 5_000)
    assert set(NUMBERS["ci"].within(1).values()) >= {1}
    assert set(NUMBERS["ci"].asked) == set(NUMBERS["soak"].asked)


def test_what_a_history_reached_is_counted() -> None:
    entries = [Entry(position, "acme", "Item", f"{position}", "d") for position in (1, 2, 3)]
    history: list[Record] = [
        *(Fired(fault="kill asked", against=name) for name in ("relay-1", "relay-2", "writer-3")),
        *(Fired(fault="postgres"), Fired(fault="stop anywhere", against="relay-4"), Did(operation="resumed")),
        *(Fired(fault=f"cut {how}") for how in ("hole", "before commit", "after commit", "swallowed", "after claim")),
    ]
    for name, how in (("t", "committed"), ("u", "rolled_back"), ("v", "unknown")):
        history += [Recorded(transaction=name, entries=entries), Undone(transaction=name, positions=[2])]
        history += [Ended(transaction=name, how=how)]
    found = reached(history)
    assert {kind: found[kind] for kind in NUMBERS["ci"].asked} == {
        "relay kills": 2,
        "PostgreSQL crashes": 1,
        "zombie resumes": 1,
        "connections cut": 5,
        "of them at COMMIT": 3,
        "events": 2,
    }
    assert (found["kill"], found["transactions"]) == (3, 3)


def test_the_table_says_what_was_not_reached() -> None:
    asked, found = {"relay kills": 2_000, "events": 50_000}, {"relay kills": 2_000, "events": 49_999}
    assert short(asked, found) == ["events"]
    heads, kills, events = table(asked, found)
    assert heads.split() == ["asked", "reached"]
    assert kills.split() == ["relay", "kills", "2,000", "2,000"]
    assert events.split() == ["events", "50,000", "49,999", "NOT", "REACHED"]


def test_a_run_fails_by_what_it_found_by_who_fell_and_by_what_it_did_not_reach() -> None:
    clean = Report(0, ())
    anomaly = Report(0, (Verdict("lost", Answer.INVALID, {}),))
    assert not failed(clean, [], [])
    assert failed(anomaly, [], [])
    assert failed(clean, ["writer-1"], [])
    assert failed(clean, [], ["events"])


def test_what_a_relay_holds_is_compared_early_and_late() -> None:
    grown = [Measured(resident=n * 1_048_576, descriptors=10, sockets=5, tasks=7) for n in range(100)]
    held = flat(grown)
    assert (held.resident_mib, held.descriptors) == ((29.5, 89.5), (10, 10))
    assert flat([]).resident_mib == (0, 0)


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox.testing.crash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_fault_that_nobody_knows_is_refused() -> None:
    done = lab("--faults", "kill,flood")
    assert done.returncode == 2
    assert "flood" in done.stderr


@pytest.mark.timeout(600)
def test_a_run_that_does_not_reach_its_numbers_says_so_and_fails(tmp_path: Path) -> None:
    """Nothing was wrong, and too little was shown: no crash of the primary ever came."""
    done = lab("--seconds", "3", "--numbers", "ci", "--faults", "kill", "--history", str(tmp_path / "history.jsonl"))
    assert done.returncode == 1, f"{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("PostgreSQL crashes")]
    assert line.split()[2:] == ["1", "0", "NOT", "REACHED"]


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_nothing_is_lost_doubled_reordered_or_brought_back(tmp_path: Path) -> None:
    """D1, D2, L1 to L4, O1, C1, C2, A1, A2, A7, W1: 2 to 5, 9 and 10 of the guarantees, under all faults at once.

    OUTBOX_TEST_CRASH_SECONDS says how long faults go on, OUTBOX_TEST_CRASH_SEED which.
    """
    history = tmp_path / "history.jsonl"
    done = lab("--seed", str(SEED), "--seconds", str(SECONDS), "--history", str(history))
    assert done.returncode == 0, f"seed {SEED}, history {history}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
    # The lease, the longest backoff, and ten seconds.
    (promised,) = [each for each in Recording(history) if isinstance(each, Promised)]
    assert promised.converge_within == 11_500_000_000
