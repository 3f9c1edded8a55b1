"""`outbox demo`: it ends with the proof, and whatever ends it leaves nothing behind."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from outbox.demo import _show_proof
from outbox.demo_data import read_sample, revised
from outbox.demo_stage import CACHE, REPORTING, SEARCH
from outbox.errors import SettingsError
from outbox.reconciliation import ReconciliationResult
from tests.waiting import eventually

EQUAL = "0 missing, 0 extra, 0 stale, 0 altered"
DEMO = [sys.executable, "-m", "outbox.cli", "demo"]
LONG = timedelta(seconds=200)
SOON = timedelta(seconds=30)


class Running:
    """A demo under way, and every process that was ever seen below it."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process = process
        self.folder = folder
        self.family: set[tuple[int, str]] = set()
        self._looked_at = 0.0

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    @property
    def errors(self) -> str:
        return (self.folder / "errors").read_text()

    def said(self, words: str) -> bool:
        """Look after the family, and whether the demo said something; it must not end before."""
        self.look()
        assert self.process.poll() is None, self.errors
        return words in self.output

    def ended(self) -> bool:
        self.look()
        return self.process.poll() is not None

    def look(self) -> None:
        # Listing all processes ten times a second would slow down what is being looked at.
        if time.monotonic() - self._looked_at < 0.3:
            return
        found = _processes()
        parents = {self.process.pid}
        while grown := {pid for pid, (parent, _) in found.items() if parent in parents} - parents:
            parents |= grown
        self.family |= {(pid, found[pid][1]) for pid in parents - {self.process.pid}}
        self._looked_at = time.monotonic()

    def survivors(self) -> list[str]:
        found = _processes()
        return [command for pid, command in self.family if pid in found and found[pid][1] == command]

    def leftovers(self) -> list[str]:
        return _left_in(self.folder / "tmp")


def _left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _processes() -> dict[int, tuple[int, str]]:
    """Every process: its parent and its command, which no two servers of ours share."""
    listing = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,args="], capture_output=True, text=True, check=True)
    rows = (line.split(None, 2) for line in listing.stdout.splitlines())
    return {int(row[0]): (int(row[1]), row[2]) for row in rows if len(row) == 3}


@contextmanager
def _demo(folder: Path, *arguments: str) -> Iterator[Running]:
    temporary = folder / "tmp"
    temporary.mkdir()
    # Servers run under accounts of their own when we are root.
    temporary.chmod(0o777)
    with (folder / "output").open("wb") as output, (folder / "errors").open("wb") as errors:
        environment = {**os.environ, "TMPDIR": str(temporary)}
        process = subprocess.Popen([*DEMO, *arguments], stdout=output, stderr=errors, env=environment)
    try:
        yield Running(process, folder)
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(260)
async def test_ends_with_the_proof_and_leaves_nothing(directory: Path):
    with _demo(directory, "--once") as demo:
        await eventually(demo.ended, LONG)

        assert demo.process.returncode == 0, demo.errors
        assert demo.errors == ""
        lines = demo.output.splitlines()
        assert [line.split("]")[0] for line in lines if line.startswith("[")] == [f"[{act}/6" for act in range(1, 7)]
        assert lines[-1] == EQUAL
        for name in (SEARCH, CACHE, REPORTING):
            assert re.search(rf"^{name} +{EQUAL} +\([1-9]\d\d compared", demo.output, re.MULTILINE)
        assert "no attempt spent" in demo.output
        assert f"{CACHE}: 3 missing, 2 extra, 2 stale, 3 altered" in demo.output
        assert "\x1b" not in demo.output
        assert len({command.split()[0] for _, command in demo.family if "lifeline" not in command}) >= 3
        assert demo.survivors() == []
        assert demo.leftovers() == []


@pytest.mark.timeout(260)
@pytest.mark.parametrize(
    ("moment", "how"),
    [
        pytest.param("starting PostgreSQL", signal.SIGTERM, id="while-servers-start"),
        pytest.param("[3/6]", signal.SIGINT, id="in-the-outage"),
    ],
)
async def test_a_signal_leaves_nothing(directory: Path, moment: str, how: signal.Signals):
    with _demo(directory, "--once") as demo:
        await eventually(lambda: demo.said(moment), LONG)
        demo.process.send_signal(how)
        # The second must not cut off the cleaning up that the first began.
        demo.process.send_signal(how)
        await eventually(demo.ended, SOON)

        assert demo.process.returncode == 128 + how
        assert EQUAL not in demo.output.splitlines()
        assert "Traceback" not in demo.errors
        assert demo.survivors() == []
        assert demo.leftovers() == []


@contextmanager
def _demo_in_a_terminal(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24", "TMPDIR": str(folder)}
    process = subprocess.Popen(DEMO, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.set_blocking(ours, False)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.timeout(260)
async def test_a_terminal_gets_a_picture_and_a_signal_ends_it(directory: Path):
    seen = bytearray()
    with _demo_in_a_terminal(directory) as (process, terminal):

        def shown(words: str) -> bool:
            # Reading fails while there is nothing, and once the other end is closed.
            with suppress(OSError):
                seen.extend(os.read(terminal, 65_536))
            return words in seen.decode(errors="replace")

        await eventually(lambda: shown("steady"), LONG)
        process.send_signal(signal.SIGINT)
        await eventually(lambda: shown("nothing of the kind") or process.poll() is not None, SOON)

    picture = seen.decode(errors="replace")
    assert process.returncode == 130
    assert "act 1 of 6" in picture
    assert "\x1b[" in picture
    assert "Traceback" not in picture
    assert _left_in(directory) == []


def test_a_server_that_cannot_start_is_told_and_leaves_nothing(directory: Path):
    (directory / "tmp").mkdir()
    environment = {**os.environ, "OUTBOX_PG_BINDIR": "/nowhere", "TMPDIR": str(directory / "tmp")}
    done = subprocess.run([*DEMO, "--once"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("outbox: OUTBOX_PG_BINDIR=/nowhere does not hold")
    assert _left_in(directory / "tmp") == []


@pytest.mark.parametrize(
    ("differs", "equal"),
    [
        ({}, True),
        ({"missing": 1}, False),
        ({"altered": 1}, False),
        ({"in_flight": 1}, False),
        ({"secondary_count": 4}, False),
        ({"primary_count": 0, "secondary_count": 0}, False),
    ],
)
def test_only_a_full_comparison_is_a_proof(differs: dict[str, int], equal: bool):
    whole = ReconciliationResult("a", primary_count=5, secondary_count=5)
    other = ReconciliationResult("b", **{"primary_count": 5, "secondary_count": 5} | differs)
    assert _show_proof([whole, other], 5, 1.0) is equal


def test_nothing_compared_proves_nothing():
    assert not _show_proof([ReconciliationResult("a")], 0, 1.0)
    assert not _show_proof([], 0, 1.0)


def test_a_revision_leaves_the_rest_to_the_letter():
    content = '{"resourceType":"Observation","id":"1","meta":{"profile":["x"]},"value":1.50,"z":1,"a":1e2}'
    changed = revised(content, 7, "2")
    assert '"value":1.50,"z":1,"a":1e2}' in changed
    document = json.loads(changed)
    assert document["id"] == "2"
    assert document["meta"]["versionId"] == "7"
    assert document["meta"]["profile"] == ["x"]


def test_the_sample_leaves_out_what_cannot_be_carried(tmp_path: Path):
    good = [{"resourceType": "Patient", "id": str(number)} for number in range(30)]
    others = [
        {"resourceType": "Patient", "id": "1", "again": True},
        {"resourceType": "Patient", "id": "large", "text": "x" * 70_000},
        {"resourceType": "Patient", "id": "nul", "text": "a\x00b"},
        {"resourceType": "Patient"},
    ]
    (tmp_path / "own.ndjson").write_text("\n".join(map(json.dumps, good + others)))
    assert [each.resource_id for each in read_sample(tmp_path)] == [str(number) for number in range(30)]


@pytest.mark.parametrize("rows", [[], [{"resourceType": "Patient", "id": "1"}]])
def test_too_little_data_is_refused_before_anything_starts(tmp_path: Path, rows: list[dict[str, str]]):
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(row))
    with pytest.raises(SettingsError, match="setting 'data'"):
        read_sample(tmp_path)
