"""Lets a mutant out in a copy of the project, runs the tests that must see it there, and says whether they did."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.zoo.mutants import Mutant

ROOT = Path(__file__).parents[2]
_COPIED = ("outbox", "tests", "migrations", "examples", "pyproject.toml", "alembic.ini")
# A minute is the aim, on a machine that has nothing else to do.
_SECONDS = 120
_NURSERY = Path(__file__).parent / "nursery.py"
_OPTIONS = [
    *("-q", "-p", "tests.zoo.witness", "-p", "no:randomly", "--timeout", "50", "--tb", "short"),
    # What the nursery has loaded is not rewritten, and need not be.
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),
]
# What a test of ours says when it sees something wrong; everything else a mutant must name.
_SEEN = {"AssertionError", "Failed", "TimeoutError"}


@dataclass(frozen=True)
class Ran:
    """How tests ended in a copy: a dict for each phase of each test, how long it took, and what pytest printed."""

    endings: list[dict[str, Any]]
    seconds: float
    printed: str
    first_try: bool = True

    def of(self, test: str) -> list[dict[str, Any]]:
        """The endings of a test, with all of its parameters if none are named."""
        return [each for each in self.endings if each["test"] == test or each["test"].startswith(f"{test}[")]


def snapshot(into: Path) -> Path:
    """Copy what is needed of the project as it is now."""
    for name in _COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, into / name)
        else:
            shutil.copy2(source, into / name)
    return into


class Cage:
    """Where mutants are let out, one after the other: a server, and a process that their runs are forked from."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        pipe = subprocess.PIPE
        self._nursery = subprocess.Popen([sys.executable, _NURSERY], stdin=pipe, stdout=pipe, text=True)

    def close(self) -> None:
        self._nursery.communicate()

    def let_out(self, mutant: Mutant, project: Path) -> Ran:
        """Run the tests that must catch a mutant, with it in the code of a copy of `project`."""
        with TemporaryDirectory(prefix="outbox-zoo-") as directory:
            root = Path(shutil.copytree(project, directory, dirs_exist_ok=True))
            # Servers of tests may run under another account.
            root.chmod(0o755)
            mutant.apply(root)
            return self.run(mutant.caught_by, root, _SECONDS)

    def run(self, tests: Iterable[str], root: Path, seconds: float) -> Ran:
        """Run tests of a copy in a process of its own, against a server that is there already."""
        with TemporaryDirectory(prefix="outbox-zoo-notes-") as notes:
            endings, printed = Path(notes) / "endings", Path(notes) / "printed"
            surroundings = os.environ | {
                "PYTHONPATH": str(root),
                "OUTBOX_TEST_DSN": self._dsn,
                "OUTBOX_TEST_ZOO": "none",
                "OUTBOX_ZOO_ENDINGS": str(endings),
                "PYTEST_ADDOPTS": "",
            }
            run = {"root": str(root), "options": [*_OPTIONS, *tests], "surroundings": surroundings}
            started = time.monotonic()
            said = self._ask({"run": run | {"printed": str(printed)}, "seconds": seconds})
            took = time.monotonic() - started
            endings.touch()
            found = [json.loads(line) for line in endings.read_text().splitlines()]
            cut_off = f"\ncut off after {seconds:g} s" if said["cut_off"] else ""
            return Ran(found, took, printed.read_text() + cut_off)

    def _ask(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._nursery.stdin is not None
        assert self._nursery.stdout is not None
        self._nursery.stdin.write(json.dumps(asked) + "\n")
        self._nursery.stdin.flush()
        said = self._nursery.stdout.readline()
        assert said, "the process that runs are forked from has ended; what it said of it is above"
        return json.loads(said)


def escaped(mutant: Mutant, ran: Ran) -> list[str]:
    """Return why a mutant does not count as caught, a sentence for each test that did not see it."""
    sentences = ((test, _missed(ran.of(test), mutant.raises)) for test in mutant.caught_by)
    return [f"{test} {sentence}" for test, sentence in sentences if sentence is not None]


def _missed(endings: list[dict[str, Any]], raises: Sequence[str]) -> str | None:
    if not endings:
        return "did not run"
    if broken := [each for each in endings if each["when"] == "setup" and each["outcome"] == "failed"]:
        return f"could not run: {broken[0]['errors']} {broken[0]['said']}"
    ended = [each for each in endings if each["when"] == "call" and each["outcome"] != "skipped"]
    if not ended:
        return f"was skipped: {endings[-1]['said']}"
    failed = [each for each in ended if each["outcome"] == "failed"]
    if not failed:
        return "passed: the mutant got away"
    if any(_saw(each, raises) for each in failed):
        return None
    return f"failed by something else: {failed[0]['errors']} {failed[0]['said']}"


def _saw(ending: dict[str, Any], raises: Sequence[str]) -> bool:
    # A test that hangs until it is cut off has seen nothing.
    cut_off = ending["errors"] == ["Failed"] and ending["said"].startswith("Timeout")
    return not cut_off and bool({*_SEEN, *raises}.intersection(ending["errors"]))
