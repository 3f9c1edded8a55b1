"""What is said while the run goes on."""

from __future__ import annotations

from msgspec import field

from outbox.testing.records.ground import Entry, Key, Said

__all__ = [
    "Answered",
    "Applied",
    "Asked",
    "Began",
    "Claimed",
    "Counted",
    "Damaged",
    "Did",
    "Drained",
    "Ended",
    "Finished",
    "Fired",
    "Healed",
    "Measured",
    "Opened",
    "Promised",
    "Pruned",
    "Reconciled",
    "Recorded",
    "Refused",
    "Settled",
    "Told",
    "Undone",
    "Waiting",
]


class Opened(Said, frozen=True, kw_only=True):
    """A process takes part from now on. A fake secondary names itself, so that its silence is telling."""

    pid: int
    role: str = ""
    backend_id: str = ""


class Promised(Said, frozen=True, kw_only=True):
    """What the run set out to show; durations in nanoseconds, kinds with the number of times they must be seen.

    Zero promises nothing. `most_again` bounds how often events may be handed over again, per fault.
    """

    seed: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    most_attempts: int = 0
    most_again: float = 0
    converge_within: int = 0


class Began(Said, frozen=True, kw_only=True):
    """A writer begins a transaction; its name is the harness's own and unique in the run."""

    transaction: str


class Recorded(Said, frozen=True, kw_only=True):
    """A transaction recorded events that are owed to these secondaries; to all there are, if it names none."""

    transaction: str
    entries: list[Entry]
    backend_ids: list[str] = field(default_factory=list)


class Undone(Said, frozen=True, kw_only=True):
    """A savepoint was rolled back, and these events with it."""

    transaction: str
    positions: list[int]


class Ended(Said, frozen=True, kw_only=True):
    """A transaction ended: `committed`, `rolled_back`, or `unknown` when the answer to COMMIT never came."""

    transaction: str
    how: str


class Claimed(Said, frozen=True, kw_only=True):
    """A relay's claim is committed. `lease` is in nanoseconds."""

    backend_id: str
    attempt_id: int
    positions: list[int]
    lease: int = 0


class Settled(Said, frozen=True, kw_only=True):
    """A relay settled: `asked` is the instant before, `counted` whether the attempt was still its own.

    `how` is `lost` when it closed what had run out, its own or another's.
    """

    backend_id: str
    attempt_id: int
    asked: int
    counted: bool
    how: str = ""


class Asked(Said, frozen=True, kw_only=True):
    """A secondary was asked to apply these; `caller` is the process or relay that asked, `attempt_id` if it said so."""

    backend_id: str
    call: str
    entries: list[Entry]
    caller: str = ""
    attempt_id: int = 0


class Applied(Said, frozen=True, kw_only=True):
    """A secondary now holds these states. Written in one breath with the effect, before the answer."""

    backend_id: str
    call: str
    entries: list[Entry]


class Refused(Said, frozen=True, kw_only=True):
    """A secondary did not take these: `stale`, `retry`, `refused` (they are not to blame) or `rejected`."""

    backend_id: str
    call: str
    positions: list[int]
    why: str = "stale"


class Answered(Said, frozen=True, kw_only=True):
    """A call is over: `answered`, `raised`, `cut` (its answer was lost), or `abandoned` (its caller was gone)."""

    backend_id: str
    call: str
    how: str = "answered"


class Fired(Said, frozen=True, kw_only=True):
    """The nemesis did something, to a process, a relay or a secondary, if to one."""

    fault: str
    against: str = ""


class Healed(Said, frozen=True, kw_only=True):
    """What the nemesis did is over."""

    fault: str
    against: str = ""


class Damaged(Said, frozen=True, kw_only=True):
    """The nemesis changed what a secondary holds behind everybody's back; no position means that it was deleted."""

    backend_id: str
    entry: Entry


class Waiting(Said, frozen=True, kw_only=True):
    """Somebody asks whether these events are on these secondaries."""

    wait: str
    positions: list[int]
    backend_ids: list[str]


class Told(Said, frozen=True, kw_only=True):
    """He was told: `done` names the secondaries that were said to have all of it."""

    wait: str
    done: list[str]


class Reconciled(Said, frozen=True, kw_only=True):
    """A comparison ended; `drift` are the keys it reported."""

    backend_id: str
    drift: list[Key] = field(default_factory=list)
    repaired: int = 0


class Pruned(Said, frozen=True, kw_only=True):
    """Old events were forgotten; which, where that is known.

    Said once at the beginning, without any, where relays prune by themselves: else what is gone was never there.
    """

    positions: list[int] = field(default_factory=list)


class Counted(Said, frozen=True, kw_only=True):
    """What a status page said is pending, and a recount in the same snapshot."""

    backend_id: str
    reported: int
    recounted: int


class Did(Said, frozen=True, kw_only=True):
    """Any other operation succeeded: a redrive, a page of a backfill, a secondary added or removed."""

    operation: str


class Drained(Said, frozen=True, kw_only=True):
    """The harness saw nothing owed any more, after the last fault."""


class Measured(Said, frozen=True, kw_only=True):
    """How much a process holds: resident bytes, open descriptors, sockets among them, and tasks."""

    resident: int
    descriptors: int
    sockets: int
    tasks: int


class Finished(Said, frozen=True, kw_only=True):
    """The process leaves of its own accord."""
