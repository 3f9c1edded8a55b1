"""The crash lab: a run of faults by the seed, and a history without an anomaly at its end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from outbox.testing.crash.nemesis import Nemesis
from outbox.testing.crash.plan import FAULTS, plan
from outbox.testing.crash.terms import Terms

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


def lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "outbox.testing.crash", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_fault_that_nobody_knows_is_refused() -> None:
    done = lab("--faults", "kill,flood")
    assert done.returncode == 2
    assert "flood" in done.stderr


@pytest.mark.timeout(SECONDS * 2 + 300)
def test_nothing_is_lost_doubled_reordered_or_brought_back(tmp_path: Path) -> None:
    """D1, D2, L1 to L4, O1, C1, C2, A1, A2, A7, W1: 2 to 5, 9 and 10 of the guarantees, under all faults at once.

    OUTBOX_TEST_CRASH_SECONDS says how long faults go on, OUTBOX_TEST_CRASH_SEED which.
    """
    history = tmp_path / "history.jsonl"
    done = lab("--seed", str(SEED), "--seconds", str(SECONDS), "--history", str(history))
    assert done.returncode == 0, f"seed {SEED}, history {history}\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}"
