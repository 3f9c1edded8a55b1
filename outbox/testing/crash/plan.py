"""Plan: which faults strike when. It follows from the seed and the terms alone."""

from __future__ import annotations

import random
from typing import Literal

import msgspec

from outbox.testing.crash.terms import BACKENDS, Terms

__all__ = ["FAULTS", "STAGES", "Strike", "plan"]


class Strike(msgspec.Struct, frozen=True):
    """One fault: when, in seconds from the start, of which kind and how, for how long, and a number to choose by."""

    at: float
    fault: str
    how: str
    seconds: float
    number: int

    @property
    def name(self) -> str:
        """What the history calls it."""
        return f"{self.fault} {self.how}".strip()

    @property
    def waits(self) -> bool:
        """Whether it waits for somebody to reach a point, which nobody may."""
        return self.how in (*STAGES, "before commit", "swallowed", "asked", "applied")

    @property
    def stage(self) -> str:
        """The stage it waits for, if it waits for one."""
        return self.how.rpartition(" ")[2] if self.how != "swallowed" else "commit"

    @property
    def when(self) -> Literal["before", "after"]:
        """Whether the primary is not to hear of it, or the client is not to hear from the primary."""
        return "before" if self.how.startswith("before") else "after"

    @property
    def backend_id(self) -> str:
        """The secondary it is about, if it is about one."""
        return sorted(BACKENDS)[self.number % len(BACKENDS)]


class _Kind(msgspec.Struct, frozen=True):
    """How often a fault strikes, in which ways, and for how many leases at most."""

    per_second: float
    ways: tuple[str, ...] = ("",)
    leases: tuple[float, float] = (0, 0)


#: Points in the life of an attempt at which a process can be struck, as the statements of its relay show them.
STAGES = (
    *("before claim", "after claim", "after commit", "before load", "after load"),
    *("before settle", "after settle", "before tidy", "after tidy", "before heartbeat", "after heartbeat"),
)

FAULTS: dict[str, _Kind] = {
    "kill": _Kind(4, (*["anywhere"] * 12, *["asked", "applied"] * 4, *STAGES)),
    "stop": _Kind(0.45, (*["anywhere", "asked", "applied"] * 4, *STAGES), (1.2, 2.5)),
    "writer": _Kind(0.2),
    "postgres": _Kind(0.1),
    "terminate": _Kind(0.2),
    "cut": _Kind(
        1, (*["before commit", "after commit"] * 2, *STAGES, "swallowed", "reset", "hole", "slow"), (0.3, 2.5)
    ),
    "secondary": _Kind(0.4, ("down", "throttled", "hung", "late", "slow", "mute", "partly", "short"), (0.3, 1.5)),
    "poison": _Kind(0),
    "deadly": _Kind(0),
}
"""Every kind of fault. The last two are in what is written, and strike nobody else."""


def plan(terms: Terms) -> list[Strike]:
    """Return what strikes in a run, in order; every kind by dice of its own, so that one more changes no other."""
    strikes: list[Strike] = []
    for fault in terms.faults:
        kind, dice = FAULTS[fault], random.Random(f"{terms.seed} {fault}")  # noqa: S311 - not a secret
        # As many as the rate says, at any time: what a run is asked for must not be for the dice to give.
        for _ in range(round(terms.numbers.often.get(fault, kind.per_second) * terms.seconds)):
            at, lasting = dice.uniform(0, terms.seconds), dice.uniform(*kind.leases) * terms.lease
            strikes.append(Strike(at, fault, dice.choice(kind.ways), lasting, dice.randrange(2**31)))
    return sorted(strikes, key=lambda strike: strike.at)
