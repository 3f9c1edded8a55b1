"""Any order of anything: random programs for writers, relays, operators and time, against a small model.

`OUTBOX_TEST_MODEL_EXAMPLES` says how many; each failure prints the shortest program that shows it, and what replays it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from outbox import waiters
from outbox.testing.postgres import PostgresServer
from tests.conftest import new_database
from tests.model.ground import TROUBLES, Ground
from tests.model.machine import OutboxMachine

pytestmark = pytest.mark.long

EXAMPLES = int(os.environ.get("OUTBOX_TEST_MODEL_EXAMPLES", "60"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=50,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
# All but what only some programs come to; a run that is long enough has met each.
MUST_HAPPEN = ("settled", "fenced", "lost", "absorbed", "discarded", "pruned", "damaged", "drift", *TROUBLES)
LONG_ENOUGH = 50
# What is rare may be missing in one.
ROUNDS = 5


@pytest.mark.timeout(600 + 10 * EXAMPLES)
def test_any_program_is_what_the_model_says(
    postgres: PostgresServer, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine, a look is waited for.
    monkeypatch.setattr(waiters, "_FIRST_LOOK", 60.0)
    tally: Counter[str] = Counter()
    with new_database(postgres, template) as name:
        ground = Ground(postgres.dsn(name))
        try:
            for _ in range(ROUNDS):
                run_state_machine_as_test(lambda: OutboxMachine(ground, tally), settings=SETTINGS)
                if EXAMPLES < LONG_ENOUGH or all(tally[what] for what in MUST_HAPPEN):
                    break
        finally:
            ground.close()
    assert EXAMPLES < LONG_ENOUGH or all(tally[what] for what in MUST_HAPPEN), tally
