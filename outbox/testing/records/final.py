"""What is there when all is over: the tables, the primary's resources, and what each secondary shows."""

from __future__ import annotations

from msgspec import field

from outbox.testing.records.ground import Entry, Key, Said

__all__ = ["Attempted", "Contents", "Dumped", "GivenUp", "Held", "Kept", "Owed", "Registered", "Rows"]


class Kept(Said, frozen=True, kw_only=True):
    """Events that are in the outbox."""

    entries: list[Entry]


class Owed(Said, frozen=True, kw_only=True):
    """Deliveries that wait."""

    backend_id: str
    positions: list[int]


class Attempted(Said, frozen=True, kw_only=True):
    """One attempt. Instants are the primary's, `finished` is 0 while it is open."""

    backend_id: str
    attempt_id: int
    relay_id: str
    positions: list[int]
    started: int
    finished: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class Held(Said, frozen=True, kw_only=True):
    """One hold."""

    backend_id: str
    key: Key
    state: str
    positions: list[int]
    oldest: int
    attempts: int = 0


class GivenUp(Said, frozen=True, kw_only=True):
    """What an operator discarded, from the oldest position it stood for to the newest."""

    backend_id: str
    key: Key
    oldest: int
    position: int


class Registered(Said, frozen=True, kw_only=True):
    """A secondary's terms and its totals of all attempts through `folded_through`, `discarded` among them."""

    backend_id: str
    ordering: str = "state"
    status: str = "live"
    folded_through: int = 0
    totals: dict[str, int] = field(default_factory=dict)


class Rows(Said, frozen=True, kw_only=True):
    """Resources as the primary has them; they carry no position."""

    entries: list[Entry]


class Contents(Said, frozen=True, kw_only=True):
    """Live resources as a secondary shows them to whoever reads it."""

    backend_id: str
    entries: list[Entry]


class Dumped(Said, frozen=True, kw_only=True):
    """Everything was read; `rows` whether the primary's resources were too."""

    rows: bool = True
