"""History: one file per run, to which every process appends what it saw, and which nobody rewrites.

The order of the lines is no order of time across processes, but it keeps cause before effect wherever the cause was
written before it was acted on: that is the rule for whoever writes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from msgspec.structs import replace

from outbox.errors import OutboxError
from outbox.testing.records import Finished, Opened, Record

__all__ = ["BrokenHistory", "History", "Recording"]

_PROCESS = re.compile(rb'"process":"([^"\\]*)"')
_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Record)


class BrokenHistory(OutboxError):
    """A file is not a history, or was damaged in a way that no killed process explains."""


class History:
    """Appends records to a file that several processes share; what is written survives the death of its writer.

    One call of the kernel per line, and no fsync: a killed process loses at most the line it was writing. Open it anew
    after a fork: `process` must be another for each process that ever takes part, also where a pid comes again.
    """

    def __init__(self, path: Path, *, process: str = "", role: str = "", backend_id: str = "") -> None:
        self.process = process or f"{role or 'process'}-{os.getpid()}-{time.monotonic_ns():x}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self.write(Opened(pid=os.getpid(), role=role, backend_id=backend_id))

    def write(self, record: Record) -> None:
        """Append a record, with this instant and this process unless it has its own.

        Raises `OSError` when the file cannot take it: a history with a gap proves nothing.
        """
        stamped = replace(record, at=record.at or time.monotonic_ns(), process=record.process or self.process)
        # The newline comes first: what a killed process left torn then ends where the next line begins.
        line = b"\n" + _encoder.encode(stamped)
        if os.write(self._file, line) != len(line):
            raise OSError("a line of the history was written in part")

    def close(self) -> None:
        """Say that the process leaves, and close the file; calling it twice is harmless."""
        if self._file >= 0:
            self.write(Finished())
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Recording:
    """A history to be read, any number of times, line by line.

    A torn line is passed by and counted in `torn`, as the last word of a process. Raises `BrokenHistory` when its
    process went on afterwards, or when a line is well-formed and says nothing we know.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.torn = 0

    def __iter__(self) -> Iterator[Record]:
        self.torn = 0
        silent: set[bytes] = set()
        decode = _decoder.decode
        with self._path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if len(line) < 2:
                    continue
                try:
                    record = decode(line)
                except msgspec.ValidationError as error:
                    raise BrokenHistory(f"line {number} is not a record") from error
                except msgspec.DecodeError:
                    self.torn += 1
                    silent.update(_PROCESS.findall(line)[:1])
                    continue
                if silent and record.process.encode() in silent:
                    raise BrokenHistory(f"line {number}: its process goes on after a torn line")
                yield record
