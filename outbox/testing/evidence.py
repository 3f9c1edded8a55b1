"""Evidence: the few records of a history that show an anomaly, cut down to what concerns it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from outbox.testing.checks.verdict import Anomaly
from outbox.testing.records import Record

__all__ = ["MOST_RECORDS", "Shown", "evidence"]

#: So many records are shown of one anomaly: the first of them.
MOST_RECORDS = 12

_NAMING = ("call", "transaction", "attempt_id", "wait", "key")
_BY_KEY = {"Rows", "Contents"}
_encoder = msgspec.json.Encoder()


class Shown(msgspec.Struct):
    """An anomaly and its records."""

    anomaly: Anomaly
    records: list[Record] = []

    def lines(self) -> Iterable[str]:
        """Yield the records as they stand in the history."""
        return (_encoder.encode(record).decode() for record in self.records)


def evidence(history: Iterable[Record], anomalies: Sequence[Anomaly]) -> tuple[Shown, ...]:
    """Go through a history again and collect what each anomaly is about."""
    shown = [Shown(anomaly) for anomaly in anomalies]
    concerns = [_Concern(each) for each in shown]
    by_name: dict[object, list[_Concern]] = defaultdict(list)
    for concern in concerns:
        for name in concern.names:
            by_name[name].append(concern)
    for record in history:
        # Nearly no record is about any of them, which one look per name in it finds out.
        found = {id(each): each for name in _names(record) if name in by_name for each in by_name[name]}
        for concern in found.values():
            concern.take(record)
    return tuple(shown)


def _names(record: Any) -> Iterator[object]:
    """Yield whatever a record may be found by."""
    yield type(record).__name__.lower()
    for field in _NAMING:
        if (name := getattr(record, field, None)) is not None:
            yield (field, name)
    if type(record).__name__ in _BY_KEY:
        yield from (("key", entry.key) for entry in record.entries)
    for entry in getattr(record, "entries", ()):
        yield entry.position
    yield from getattr(record, "positions", ())


class _Concern:
    """What an anomaly is about."""

    def __init__(self, shown: Shown) -> None:
        anomaly = self._anomaly = shown.anomaly
        self._shown = shown
        self._positions = set(anomaly.positions)
        lists = {
            "call": anomaly.calls,
            "transaction": anomaly.transactions,
            "attempt_id": anomaly.attempt_ids,
            "wait": anomaly.waits,
            "key": (anomaly.key,) if anomaly.key else (),
        }
        named = {(field, name) for field, names in lists.items() for name in names}
        self.names: set[object] = {*self._positions, *named, *anomaly.whole}

    def take(self, record: Any) -> None:
        """Add a record that has one of our names, cut down to what concerns us, unless it is another secondary's."""
        other = getattr(record, "backend_id", "") or self._anomaly.backend_id
        if len(self._shown.records) < MOST_RECORDS and self._anomaly.backend_id in {"", other}:
            self._shown.records.append(replace(record, **self._cut(record)))

    def _cut(self, record: Any) -> dict[str, Any]:
        cut: dict[str, Any] = {}
        if entries := getattr(record, "entries", None):
            key = self._anomaly.key if type(record).__name__ in _BY_KEY else None
            found = [each for each in entries if each.position in self._positions or (key and each.key == key)]
            cut = {"entries": found} if found else {}
        positions = getattr(record, "positions", None)
        if positions and (found := [each for each in positions if each in self._positions]):
            cut = {"positions": found}
        return cut
