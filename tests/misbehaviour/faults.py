"""What a fault is: how it is made, on any stand, and how it ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from tests.misbehaviour.outcomes import Cannot, Outcome

# The one key that some faults are about.
POISON = "poison"


@dataclass(frozen=True)
class Fault:
    """`make` gets the stand and lasts as long as the fault. `timeout` is the adapter's, in seconds."""

    name: str
    make: Callable[[Any], AbstractAsyncContextManager[None]]
    timeout: float = 30
    named: bool = False
    poison: str = '{"value":666}'


Rows = list[tuple[Fault, dict[str, Outcome]]]


@dataclass(frozen=True)
class Section:
    """Rows of faults of one kind. `elsewhere` says why they cannot arise for the adapters that have no cell."""

    title: str
    rows: Rows
    elsewhere: dict[str, str]
    front: bool = False

    def cell(self, cells: dict[str, Outcome], adapter: str) -> Outcome:
        return cells[adapter] if adapter in cells else Cannot(self.elsewhere[adapter])
