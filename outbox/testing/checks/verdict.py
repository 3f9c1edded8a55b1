"""Verdict: what a check answers, with counts, and with the few records that show it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import msgspec

from outbox.testing.facts import Facts
from outbox.testing.records import Key

__all__ = ["MOST_SHOWN", "Anomaly", "Answer", "Check", "Judgement", "Verdict"]

#: So many anomalies of one check are shown; all are counted.
MOST_SHOWN = 5


class Answer(StrEnum):
    """What a check says of a history."""

    VALID = "valid"
    INVALID = "invalid"
    UNKNOWN = "unknown"
    """There is not enough in the history to tell."""


class Anomaly(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that should not be, and what its records can be found by."""

    text: str
    backend_id: str = ""
    key: Key | None = None
    positions: tuple[int, ...] = ()
    transactions: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    attempt_ids: tuple[int, ...] = ()
    waits: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()


class Verdict(msgspec.Struct, frozen=True):
    """The answer of one check: counts of what was looked at, the first anomalies, and what was missing to tell more."""

    check: str
    answer: Answer
    counts: dict[str, int]
    anomalies: tuple[Anomaly, ...] = ()
    missing: tuple[str, ...] = ()


Check = Callable[[Facts], Verdict]


class Judgement:
    """Collects what a check finds. A check that looked at nothing has not shown anything."""

    def __init__(self, check: str) -> None:
        self._check = check
        self._found: list[Anomaly] = []
        self._missing: dict[str, None] = {}
        self.counts: Counter[str] = Counter(checked=0, anomalies=0)

    def looked(self, times: int = 1) -> None:
        """Count what was looked at."""
        self.counts["checked"] += times

    def wrong(self, text: str, **found_by: Any) -> None:
        """Note an anomaly; `found_by` are the fields of `Anomaly`."""
        self.counts["anomalies"] += 1
        if len(self._found) < MOST_SHOWN:
            self._found.append(Anomaly(text=text, **found_by))

    def lacks(self, what: str) -> None:
        """Note that the history does not say `what`, and that something therefore stays open."""
        self._missing[what] = None

    def verdict(self) -> Verdict:
        """Return the answer: invalid wherever something is wrong, valid only where nothing was left open."""
        if self.counts["anomalies"]:
            answer = Answer.INVALID
        else:
            answer = Answer.UNKNOWN if self._missing or not self.counts["checked"] else Answer.VALID
        return Verdict(self._check, answer, dict(self.counts), tuple(self._found), tuple(self._missing))
