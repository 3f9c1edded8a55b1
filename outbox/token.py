"""Token: what a transaction recorded, as text that any process can wait on."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from typing import Self

import msgspec

from outbox.errors import InvalidToken

__all__ = ["Recorded", "SyncToken"]

_FORM = "o1."


class Recorded(msgspec.Struct, frozen=True, array_like=True):
    """Positions of one transaction that are owed to the same secondaries, as runs of (first, how many)."""

    transaction_id: int
    backend_ids: tuple[str, ...]
    runs: tuple[tuple[int, int], ...]

    @property
    def positions(self) -> list[int]:
        """The positions, one by one, rising."""
        return [position for first, count in self.runs for position in range(first, first + count)]


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
        return cls._encoded([Recorded(transaction_id, names, _runs(found)) for names, found in groups.items()])

    @classmethod
    def merged(cls, tokens: Iterable[SyncToken]) -> Self:
        """Return one token for everything that these recorded."""
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for token in tokens:
            for each in token.recorded:
                groups.setdefault((each.transaction_id, each.backend_ids), []).extend(each.positions)
        return cls._encoded([Recorded(*group, _runs(positions)) for group, positions in groups.items()])

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
        """Positions of all events, rising."""
        return sorted(position for each in self.recorded for position in each.positions)

    @property
    def backend_ids(self) -> list[str]:
        """Names of the secondaries that are owed something, sorted."""
        return sorted({name for each in self.recorded for name in each.backend_ids})

    def owed_to(self, backend_id: str) -> list[int]:
        """Positions that are owed to one secondary, rising."""
        return sorted(
            position for each in self.recorded if backend_id in each.backend_ids for position in each.positions
        )

    @classmethod
    def _encoded(cls, recorded: list[Recorded]) -> Self:
        packed = msgspec.msgpack.encode(recorded)
        return cls(_FORM + base64.urlsafe_b64encode(_checksum(packed) + packed).decode().rstrip("="))


def _checksum(packed: bytes) -> bytes:
    """Four bytes: what was cut or mistyped on its way must not be waited on as something else."""
    return zlib.crc32(packed).to_bytes(4)


def _runs(positions: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Pack positions: those of one statement are nearly always next to each other."""
    runs: list[tuple[int, int]] = []
    for position in sorted(positions):
        if runs and position == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((position, 1))
    return tuple(runs)
