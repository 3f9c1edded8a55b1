"""What may become of a batch while a secondary misbehaves, in the words of the table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Done:
    """Nobody notices: it arrives while the fault lasts."""

    def __str__(self) -> str:
        return "done"


@dataclass(frozen=True)
class _Coded:
    codes: tuple[str, ...]

    def __init__(self, *codes: str) -> None:
        object.__setattr__(self, "codes", codes)

    def __str__(self) -> str:
        codes = " or ".join(f"`{code}`" for code in self.codes)
        return f"{self.word} {codes}"

    @property
    def word(self) -> str:
        raise NotImplementedError


class Away(_Coded):
    """The secondary is unavailable; no event spends an attempt."""

    word = "away"


class Blamed(_Coded):
    """Every event of the batch is retried."""

    word = "all retried"


class OneRetried(_Coded):
    """One key is retried, the others arrive."""

    word = "one retried"


class OneDead(_Coded):
    """One key is dead, the others arrive."""

    word = "one dead"


@dataclass(frozen=True)
class Cannot:
    """It cannot happen there, and why."""

    why: str


Outcome = Done | Away | Blamed | OneRetried | OneDead | Cannot
