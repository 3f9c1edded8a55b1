"""The history: many processes append to one file, any of them may be killed, and what it wrote is still there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from outbox.testing import records as said
from outbox.testing.checker import main
from outbox.testing.history import BrokenHistory, History, Recording
from tests.histories import INDEX, Tale, gone, state

WRITER = """
import sys
from pathlib import Path
from outbox.testing.history import History
from outbox.testing.records import Did
history = History(Path(sys.argv[1]), process=sys.argv[2])
number = 0
while True:
    number += 1
    history.write(Did(operation=f"{number} " + "x" * 3000))
    if number == 1:
        sys.stdout.write("begun\\n"); sys.stdout.flush()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.jsonl"


def written(path: Path, tale: Tale) -> None:
    with History(path, process="teller") as history:
        for record in tale.records:
            history.write(record)


def test_what_is_written_is_read(path: Path):
    tale = Tale().write(state(1), gone(2, "q")).claim(1, 1).deliver(state(1)).settle(1).told(1).end(state(1))
    written(path, tale)
    opened, *read, finished = Recording(path)
    assert read == tale.records
    assert isinstance(opened, said.Opened)
    assert isinstance(finished, said.Finished)
    assert {type(record) for record in read} <= set(said.Record.__args__)


def test_instant_and_process_are_filled_in(path: Path):
    before = time.monotonic_ns()
    with History(path, role="writer") as history:
        history.write(said.Drained())
        history.write(said.Drained(at=7, process="other"))
    opened, drained, other, _ = Recording(path)
    assert before <= opened.at <= drained.at <= time.monotonic_ns()
    assert opened.process == drained.process == history.process
    assert history.process.startswith(f"writer-{os.getpid()}-")
    assert (other.at, other.process) == (7, "other")
    history.close()


def test_each_line_begins_with_who_and_when(path: Path):
    with History(path, process="w"):
        pass
    assert all(
        b'","process":"' not in line and b'"process":"w"' in line[:60] for line in path.read_bytes().split(b"\n")[1:]
    )


def test_killed_writers_lose_at_most_their_own_last_line(path: Path):
    names = [f"w{number}" for number in range(4)]
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE) for name in names]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.readline()
    while path.stat().st_size < 4_000_000:
        os.sched_yield()
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    recording = Recording(path)
    counts = dict.fromkeys(names, 0)
    for record in recording:
        if isinstance(record, said.Did):
            counts[record.process] += 1
            assert record.operation.startswith(f"{counts[record.process]} ")
    assert all(counts.values())
    assert recording.torn <= len(names)


def test_a_torn_line_hides_no_other(path: Path):
    with History(path, process="a") as one, History(path, process="b") as other:
        one.write(said.Did(operation="whole"))
        torn = msgspec.json.encode(said.Did(at=1, process="dead", operation="torn"))
        with path.open("ab") as file:
            file.write(b"\n" + torn[:-4])
        other.write(said.Did(operation="after"))
    recording = Recording(path)
    assert [record.operation for record in recording if isinstance(record, said.Did)] == ["whole", "after"]
    assert recording.torn == 1


@pytest.mark.parametrize("cut", [1, 5, 30, 60])
def test_a_torn_last_line_is_passed_by(path: Path, cut: int):
    written(path, Tale())
    whole = path.read_bytes()
    path.write_bytes(whole + b'\n{"kind":"did","at":1,"process":"x","operation":"something long"}'[:-cut])
    recording = Recording(path)
    assert len(list(recording)) == 3
    assert recording.torn == 1


def test_nobody_goes_on_after_a_torn_line(path: Path):
    with History(path, process="a") as history:
        with path.open("ab") as file:
            file.write(b'\n{"kind":"did","at":1,"process":"a","operat')
        history.write(said.Did(operation="after"))
    with pytest.raises(BrokenHistory, match="goes on after a torn line"):
        list(Recording(path))


@pytest.mark.parametrize(
    "line", ['{"kind":"unheard of"}', '{"kind":"did","at":"x"}', '{"at":1}', "[1]", '{"kind":"did"}']
)
def test_what_is_no_record_is_refused(path: Path, line: str):
    path.write_text(f"\n{line}\n")
    with pytest.raises(BrokenHistory, match="line 2"):
        list(Recording(path))


def test_the_command_says_valid(path: Path, capsys: pytest.CaptureFixture[str]):
    written(path, Tale().write(state(1)).deliver(state(1)).end(state(1)))
    assert main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "valid    lost            1 checked" in out
    assert "invalid" not in out


def test_the_command_shows_what_is_wrong(path: Path):
    tale = Tale().write(state(1)).deliver(state(1)).write(gone(2)).deliver(gone(2)).deliver(state(1), call="again")
    written(path, tale.end(state(1), gone(2), shown={INDEX: ()}))
    with path.open("ab") as file:
        file.write(b'\n{"kind":"did",')
    command = [sys.executable, "-m", "outbox.testing.checker", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "invalid  resurrected" in done.stdout
    assert "came back after its delete, index, acme/Patient/p, 2 1" in done.stdout
    assert '"call":"again"' in done.stdout
    assert "1 torn lines" in done.stdout
    assert done.stderr == ""


def test_the_command_refuses_what_is_no_history(path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(path)]) == 2
    path.write_text('\n{"kind":"unheard of"}')
    assert main([str(path)]) == 2
    assert "line 2 is not a record" in capsys.readouterr().err
