"""The bug zoo: defects put in on purpose, each of which named tests must catch (INVARIANTS 6.4).

By default a dozen of them, others every day; `make zoo` lets out all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

import pytest

from outbox.testing.postgres import postgres_server
from tests.zoo import keeper
from tests.zoo.conftest import CAUGHT
from tests.zoo.mutants import Change, Mutant, chosen, everyone

CHOICE = chosen()
_AT_ONCE = 2
_SETTINGS = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
_CONTROL_SECONDS = 600
_GUARANTEES = range(1, 15)
# INVARIANTS 6.4, name by name.
_MUST_BE_THERE = """
no token in ack · token not increased on re-claim · ack before dispatch · dispatch before claim commit
attempt counted at finish · worker clock for lease · transaction-start time for lease
claim by id order without key guard · id cursor · horizon cursor by id · limit without materialisation
gate uses >= instead of > · delete without tombstone · tombstone pruned after 60 s · version restarts at re-create
bulk partial treated as ok · unknown outcome treated as ok · unknown treated as failed without retry
Retry-After ignored · backoff reset on restart · shutdown leaves leases · shutdown consumes attempt
NOTIFY without polling · retention ignores one secondary · wait with vacuous truth · wait by max id
repair writes directly · backfill without window · savepoint rollback keeps event
sync mode dispatches before commit · error text with NUL kills recorder · tenant missing in cache key
cancellation swallowed by retry
"""


class Zoo:
    """A copy of the project, cages, and a run for each mutant: as many at once as there are cages."""

    def __init__(self, project: Path, cages: list[keeper.Cage], mutants: list[Mutant]) -> None:
        self._project = project
        self._free: SimpleQueue[keeper.Cage] = SimpleQueue()
        for cage in cages:
            self._free.put(cage)
        self._threads = ThreadPoolExecutor(len(cages))
        # It takes longest, and would have the others wait for it at the end.
        self._control = self._threads.submit(self._in_a_cage, self._run_unmutated, mutants)
        self._runs = {mutant.name: self._threads.submit(self._in_a_cage, self._let_out, mutant) for mutant in mutants}

    def ran(self, mutant: Mutant) -> keeper.Ran:
        """How the tests ended with the mutant in the code; raises what kept them from running."""
        return self._runs[mutant.name].result()

    def unmutated(self) -> keeper.Ran:
        """How the same tests ended without any."""
        return self._control.result()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _in_a_cage(self, work: Callable[..., keeper.Ran], what: object) -> keeper.Ran:
        # Each has a server of its own: some tests look at all that goes on at theirs.
        cage = self._free.get()
        try:
            return work(what, cage)
        finally:
            self._free.put(cage)

    def _let_out(self, mutant: Mutant, cage: keeper.Cage) -> keeper.Ran:
        ran = cage.let_out(mutant, self._project)
        if keeper.escaped(mutant, ran):
            # Some are caught by a race, which a busy machine may lose once; the table says so.
            ran = replace(cage.let_out(mutant, self._project), first_try=False)
        return ran

    def _run_unmutated(self, mutants: list[Mutant], cage: keeper.Cage) -> keeper.Ran:
        tests = dict.fromkeys(test for mutant in mutants for test in mutant.caught_by)
        return cage.run(tests, self._project, _CONTROL_SECONDS)


@pytest.fixture(scope="module")
def zoo() -> Iterator[Zoo]:
    with ExitStack() as running:
        project = keeper.snapshot(Path(running.enter_context(TemporaryDirectory(prefix="outbox-zoo-project-"))))
        project.chmod(0o755)
        cages: list[keeper.Cage] = []
        while len(cages) < _AT_ONCE:
            server = running.enter_context(postgres_server(settings=_SETTINGS))
            cages.append(running.enter_context(closing(keeper.Cage(server.dsn(driver="postgresql")))))
            if server.kind == "given":
                break
        let_out = Zoo(project, cages, CHOICE.mutants)
        running.callback(let_out.close)
        yield let_out


@pytest.mark.timeout(600)
@pytest.mark.parametrize("mutant", CHOICE.mutants, ids=lambda mutant: mutant.name)
def test_it_is_caught(mutant: Mutant, zoo: Zoo, record_property: Callable[[str, object], None]) -> None:
    ran = zoo.ran(mutant)
    why = keeper.escaped(mutant, ran)
    verdict = "ESCAPED" if why else ", ".join(test.rpartition("::")[2] for test in mutant.caught_by)
    verdict += "" if ran.first_try else ", at the second try"
    record_property(CAUGHT, (mutant.name, mutant.guarantee, verdict, ran.seconds))
    assert not why, f"{mutant.name!r} is not caught: {'; '.join(why)}\n{ran.printed[-3000:]}"


@pytest.mark.timeout(900)
@pytest.mark.skipif(not CHOICE.mutants, reason="OUTBOX_TEST_ZOO lets none out")
def test_without_a_mutant_the_same_tests_pass(zoo: Zoo) -> None:
    ran = zoo.unmutated()
    failed = [each for each in ran.endings if each["outcome"] != "passed"]
    assert not failed, ran.printed[-5000:]
    for mutant in CHOICE.mutants:
        assert all(ran.of(test) for test in mutant.caught_by), f"{mutant.name} names a test that is not there"


def test_every_mutant_applies_and_every_guarantee_has_one(tmp_path: Path) -> None:
    mutants = everyone()
    names = [mutant.name for mutant in mutants]
    assert len(set(names)) == len(names)
    assert {mutant.guarantee for mutant in mutants} == {*_GUARANTEES}
    assert {*re.split(r"\s·\s|\n", _MUST_BE_THERE.strip())} <= {*names}
    for number, mutant in enumerate(mutants):
        for file in {change.file for change in mutant.changes}:
            path = tmp_path / str(number) / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text((keeper.ROOT / file).read_text())
        mutant.apply(tmp_path / str(number))
        for test in mutant.caught_by:
            assert _is_there(test), test


def _is_there(test: str) -> bool:
    """Whether a test is in its file, or is one of the contract's that a class of the file inherits."""
    file, *scopes, name = test.partition("[")[0].split("::")
    files = [keeper.ROOT / file, *((keeper.ROOT / "outbox/testing").glob("contract*.py") if scopes else ())]
    return any(f"def {name}(" in path.read_text() for path in files)


def test_one_that_does_not_apply_any_more_says_so(tmp_path: Path) -> None:
    (tmp_path / "settle.py").write_text("nothing of it")
    change = Change("settle.py", "attempt.finished_at is null", "true")
    with pytest.raises(AssertionError, match="this mutant does not apply any more"):
        Mutant("any", 5, (change,), ()).apply(tmp_path)


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ({"when": "call", "outcome": "passed"}, "got away"),
        ({"when": "setup", "outcome": "failed", "errors": ["AssertionError"]}, "could not run"),
        ({"when": "setup", "outcome": "skipped"}, "was skipped"),
        ({"when": "call", "outcome": "skipped"}, "was skipped"),
        ({"when": "call", "outcome": "failed", "errors": ["NameError"]}, "something else"),
        ({"when": "call", "outcome": "failed", "errors": ["Failed"], "said": "Timeout (>30.0s)"}, "something else"),
        (None, "did not run"),
    ],
)
def test_only_a_test_that_saw_it_has_caught_it(ending: dict[str, object] | None, said: str) -> None:
    mutant = Mutant("any", 5, (), ("tests/test_x.py::test_y",))
    endings = [] if ending is None else [{"test": "tests/test_x.py::test_y[1]", "errors": [], "said": "", **ending}]
    (why,) = keeper.escaped(mutant, keeper.Ran(endings, 0.0, ""))
    assert said in why


def test_a_failed_assertion_and_an_error_that_is_named_have_caught_it() -> None:
    for error in ("AssertionError", "Failed", "UniqueViolationError"):
        ending = {"test": "t", "when": "call", "outcome": "failed", "errors": [error], "said": ""}
        mutant = Mutant("any", 5, (), ("t",), ("UniqueViolationError",))
        assert not keeper.escaped(mutant, keeper.Ran([ending], 0.0, ""))
