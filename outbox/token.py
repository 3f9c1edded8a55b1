"""Token: what a transaction recorded, as text that any process can wait on."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Self

import msgspec

from outbox.errors import InvalidToken

__all__ = ["HIGHEST_POSITION", "Recorded", "SyncToken"]

# PostgreSQL's bigint.
HIGHEST_POSITION = 2**63 - 1

_FORM = "o1."


# One group: the transaction, its stamp, its runs, the names; numbers in hexadecimal, a run of several as
# `firstNcount`. All of it is unreserved in a URL. Put together by hand, as every writer pays: a third of what
# MessagePack and base64 take.
_NUMBER = "[0-9a-f]{1,16}"
_RUN = f"{_NUMBER}(?:N{_NUMBER})?"
_GROUP = re.compile(rf"({_NUMBER})\.({_NUMBER})\.({_RUN}(?:R{_RUN})*)?((?:\.[a-z0-9_-]{{1,63}})*)")


class Recorded(msgspec.Struct, frozen=True):
    """Positions of one transaction that are owed to the same secondaries, as runs of (first, how many).

    A crash of the primary gives positions and transaction ids that it swallowed again; `stamp` is the transaction's
    own, and what is at one of these positions with another stamp is somebody else's.

    A token comes from outside, and a run may claim to be of any length: whoever goes through `positions` does it bit by
    bit.
    """

    transaction_id: int
    stamp: int
    backend_ids: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many positions there are."""
        return sum(count for _, count in self.runs)

    @property
    def positions(self) -> Iterator[int]:
        """The positions, one by one, rising."""
        return chain.from_iterable(range(first, first + count) for first, count in self.runs)


class SyncToken(str):
    """Says which events were recorded and to whom they are owed; opaque, a few dozen characters, safe in a URL.

    Made by `record` and by a session's commit, for `SyncManager.wait_for_sync` in this process or any other. It holds
    positions and names of secondaries, and nothing of the events. A token belongs to its database. Raises
    `InvalidToken` for text that is none.
    """

    __slots__ = ()

    def __new__(cls, token: str) -> Self:
        self = super().__new__(cls, token)
        _ = self.recorded
        return self

    @classmethod
    def of(cls, transaction_id: int, stamp: int, owed: Sequence[tuple[int, Sequence[str]]]) -> Self:
        """Build from (position, names of the secondaries it is owed to)."""
        return cls.of_groups(transaction_id, stamp, [([position], names) for position, names in owed])

    @classmethod
    def of_groups(cls, transaction_id: int, stamp: int, owed: Iterable[tuple[Sequence[int], Sequence[str]]]) -> Self:
        """Build from (positions, names of the secondaries all of them are owed to)."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for positions, backend_ids in owed:
            groups.setdefault(tuple(sorted(backend_ids)), []).extend(positions)
        runs = {names: _runs(found) for names, found in groups.items()}
        return cls._encoded([Recorded(transaction_id, stamp, names, found) for names, found in runs.items()])

    @classmethod
    def of_one(cls, position: int, backend_ids: Sequence[str], transaction_id: int, stamp: int) -> Self:
        """Build from what nearly every transaction records: one event, of which there is nothing to group or join."""
        return cls._of(".".join((f"{transaction_id:x}.{stamp:x}.{position:x}", *backend_ids)))

    @classmethod
    def merged(cls, tokens: Iterable[SyncToken]) -> SyncToken:
        """Return one token for everything that these recorded."""
        tokens = list(tokens)
        if len(tokens) == 1:
            return tokens[0]
        groups: dict[tuple[int, int, tuple[str, ...]], list[tuple[int, int]]] = {}
        for token in tokens:
            for each in token.recorded:
                names = tuple(sorted(each.backend_ids))
                groups.setdefault((each.transaction_id, each.stamp, names), []).extend(each.runs)
        return cls._encoded([Recorded(*group, _joined(runs)) for group, runs in groups.items()])

    @property
    def recorded(self) -> tuple[Recorded, ...]:
        """What the token says, decoded on every call."""
        if not self.startswith(_FORM):
            raise InvalidToken
        checksum, _, body = self.removeprefix(_FORM).partition(".")
        if not body.isascii() or checksum != _checksum(body):
            raise InvalidToken
        recorded = tuple(_read(group) for group in body.split("~") if group)
        if not _each_once(recorded):
            raise InvalidToken
        return recorded

    @property
    def positions(self) -> list[int]:
        """Positions of all events, rising. For a token of one's own: one from outside may claim any number."""
        return sorted(position for each in self.recorded for position in each.positions)

    @property
    def backend_ids(self) -> list[str]:
        """Names of the secondaries that are owed something, sorted."""
        return sorted({name for each in self.recorded for name in each.backend_ids})

    def owed_to(self, backend_id: str) -> list[Recorded]:
        """What of it is owed to one secondary."""
        return [each for each in self.recorded if backend_id in each.backend_ids]

    @classmethod
    def _encoded(cls, recorded: list[Recorded]) -> Self:
        return cls._of("~".join([_written(each) for each in recorded]))

    @classmethod
    def _of(cls, body: str) -> Self:
        # Past the check of `__new__`: this text is of our own making.
        return str.__new__(cls, f"{_FORM}{_checksum(body)}.{body}")


def _checksum(body: str) -> str:
    """What was cut or mistyped on its way must not be waited on as something else."""
    return zlib.crc32(body.encode()).to_bytes(4, "big").hex()


def _written(recorded: Recorded) -> str:
    runs = "R".join([f"{first:x}" if count == 1 else f"{first:x}N{count:x}" for first, count in recorded.runs])
    return ".".join((f"{recorded.transaction_id:x}", f"{recorded.stamp:x}", runs, *recorded.backend_ids))


def _read(group: str) -> Recorded:
    found = _GROUP.fullmatch(group)
    if found is None:
        raise InvalidToken
    transaction_id, stamp, runs, names = found.groups()
    split = [run.partition("N") for run in (runs or "").split("R") if run]
    numbers = tuple((int(first, 16), int(count or "1", 16)) for first, _, count in split)
    recorded = Recorded(int(transaction_id, 16), int(stamp, 16), tuple(names.split(".")[1:]), numbers)
    ends = [first + count - 1 for first, count in numbers]
    if max(recorded.transaction_id, recorded.stamp, *chain.from_iterable(numbers), *ends) > HIGHEST_POSITION:
        raise InvalidToken
    return recorded


def _each_once(recorded: Iterable[Recorded]) -> bool:
    """Whether no event is owed twice to a secondary: whoever waits would count it twice and find it once."""
    runs: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for each in recorded:
        for name in {*each.backend_ids}:
            # Stamps and not transactions: an event is looked for by its position and its stamp.
            runs.setdefault((name, each.stamp), []).extend(each.runs)
    neighbours = chain.from_iterable(pairwise(sorted(found)) for found in runs.values())
    return all(first + count <= following for (first, count), (following, _) in neighbours)


def _runs(positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Join positions: those of one statement nearly always lie side by side, which their ends tell."""
    rising = sorted(set(positions))
    if rising[-1] - rising[0] < len(rising):
        return ((rising[0], len(rising)),)
    return _joined((position, 1) for position in rising)


def _joined(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join what touches."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and first <= sum(joined[-1]):
            start = joined[-1][0]
            joined[-1] = (start, max(sum(joined[-1]), first + count) - start)
        else:
            joined.append((first, count))
    return tuple(joined)
