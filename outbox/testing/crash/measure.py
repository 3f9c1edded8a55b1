"""Measure: how much a process holds as time goes by, for what should stay flat."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from statistics import median

import msgspec

from outbox.testing.history import History
from outbox.testing.records import Measured

__all__ = ["Flat", "flat", "measure"]

_EVERY = 1.0
_SELF = Path("/proc/self")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_MEBIBYTE = 1_048_576


class Flat(msgspec.Struct, frozen=True):
    """What a relay held that lived through a run: medians of the second and of the last fifth of its life."""

    resident_mib: tuple[float, float] = (0, 0)
    descriptors: tuple[float, float] = (0, 0)
    sockets: tuple[float, float] = (0, 0)
    tasks: tuple[float, float] = (0, 0)


async def measure(history: History) -> None:
    """Write every second what this process holds, until cancelled; nothing where the system does not say."""
    there = _SELF.exists()  # noqa: ASYNC240 - the kernel's own, and never slow
    while there:
        history.write(_measured())
        await asyncio.sleep(_EVERY)


def flat(measured: list[Measured]) -> Flat:
    """Return how it was early, once warm, and how at the end."""
    fifth = len(measured) // 5
    if not fifth:
        return Flat()
    early, late = measured[fifth : 2 * fifth], measured[-fifth:]

    def both(name: str, unit: int = 1) -> tuple[float, float]:
        first, last = (round(median(getattr(each, name) for each in part) / unit, 1) for part in (early, late))
        return first, last

    return Flat(both("resident", _MEBIBYTE), both("descriptors"), both("sockets"), both("tasks"))


def _measured() -> Measured:
    resident = int((_SELF / "statm").read_text().split()[1]) * _PAGE
    open_ones = []
    for each in (_SELF / "fd").iterdir():
        # The one by which we list is gone when we ask.
        with suppress(OSError):
            open_ones.append(str(each.readlink()))
    sockets = sum(name.startswith("socket:") for name in open_ones)
    return Measured(resident=resident, descriptors=len(open_ones), sockets=sockets, tasks=len(asyncio.all_tasks()))
