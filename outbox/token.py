"""Token: what a transaction recorded, as text that any process can wait on."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Annotated, Self

import msgspec

from outbox.errors import InvalidToken

__all__ = ["Recorded", "SyncToken"]

_FORM = "o1."


_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Name = Annotated[str, msgspec.Meta(max_length=63)]


class Recorded(msgspec.Struct, frozen=True, array_like=True):
    """Positions of one transaction that are owed to the same secondaries, as runs of (first, how many).

    A token comes from outside, and a run may claim to be of any length: whoever goes through `positions` does it bit by
    bit.
    """

    transaction_id: _Number
    backend_ids: tuple[_Name, ...]
    runs: tuple[tuple[_Number, _Number], ...]

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
    def of(cls, transaction_id: int, owed: Iterable[tuple[int, Sequence[str]]]) -> Self:
        """Build from (position, names of the secondaries it is owed to)."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for position, backend_ids in owed:
            groups.setdefault(tuple(sorted(backend_ids)), []).append(position)
        runs = {names: _joined((position, 1) for position in found) for names, found in groups.items()}
        return cls._encoded([Recorded(transaction_id, names, found) for names, found in runs.items()])

    @classmethod
    def merged(cls, tokens: Iterable[SyncToken]) -> Self:
        """Return one token for everything that these recorded."""
        groups: dict[tuple[int, tuple[str, ...]], list[tuple[int, int]]] = {}
        for token in tokens:
            for each in token.recorded:
                groups.setdefault((each.transaction_id, each.backend_ids), []).extend(each.runs)
        return cls._encoded([Recorded(*group, _joined(runs)) for group, runs in groups.items()])

    @property
    def recorded(self) -> tuple[Recorded, ...]:
        """What the token says, decoded on every call."""
        if not self.startswith(_FORM):
            raise InvalidToken
        body = self.removeprefix(_FORM)
        try:
            packed = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
            checked, recorded = packed[:4], packed[4:]
            if checked == _checksum(recorded):
                return msgspec.msgpack.decode(recorded, type=tuple[Recorded, ...])
        except (ValueError, msgspec.MsgspecError):
            pass
        raise InvalidToken

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
        packed = msgspec.msgpack.encode(recorded)
        # Past the check of `__new__`: this text is of our own making, and every writer would pay for it.
        return str.__new__(cls, _FORM + base64.urlsafe_b64encode(_checksum(packed) + packed).decode().rstrip("="))


def _checksum(packed: bytes) -> bytes:
    """Four bytes: what was cut or mistyped on its way must not be waited on as something else."""
    return zlib.crc32(packed).to_bytes(4)


def _joined(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join what touches: the positions of one statement nearly always lie side by side."""
    joined: list[tuple[int, int]] = []
    for first, count in sorted(runs):
        if joined and first <= sum(joined[-1]):
            start = joined[-1][0]
            joined[-1] = (start, max(sum(joined[-1]), first + count) - start)
        else:
            joined.append((first, count))
    return tuple(joined)
