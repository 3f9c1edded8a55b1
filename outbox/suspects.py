"""Suspects: what may have ended its relay goes out with nobody beside it, in turn with all else that is held back."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from outbox.resume import Resumed, resume
from outbox.turn import Turn

if TYPE_CHECKING:
    import asyncpg

__all__ = ["Suspects"]

# While the others have anything to send, two suspects are at least so many seconds apart.
_FOR_OTHERS = 1.0


class Suspects:
    """Whose turn it is among all that one secondary is owed: that of a suspect, which goes alone, or of the others.

    A suspect whose turn comes while something is in hand waits for that, and nothing new goes out before it has been.
    """

    def __init__(self) -> None:
        # A suspect that is out, or what one waits for.
        self._awaited: set[int] = set()
        self._made_way = False
        self._since = self._others_until = 0.0

    def block(self, in_hand: set[int]) -> bool:
        """Whether nothing may go out before something that is in hand is settled."""
        return not self._awaited.isdisjoint(in_hand)

    def freed(self, in_hand: set[int]) -> None:
        """Leave the others as much time as they had to wait: suspects that hang must not have nearly all of it."""
        if self._awaited and not self.block(in_hand):
            now = time.monotonic()
            self._others_until = max(self._others_until, now + max(_FOR_OTHERS, now - self._since))
            self._awaited = set()

    async def resume(
        self, connection: asyncpg.Connection[Any], schema: str, in_hand: set[int], *, turn: Turn, **terms: Any
    ) -> Resumed | None:
        """Look at what is held, for those whose turn it is; None while all wait for something that is in hand."""
        resumed = None
        for alone in self._turns(in_hand, due=turn.suspects):
            resumed = await resume(connection, schema, turn=turn, **terms, alone=alone)
            if alone and resumed.attempt_id:
                self._await({resumed.attempt_id})
            if any(resumed):
                break
        return resumed

    def _turns(self, in_hand: set[int], *, due: bool) -> tuple[bool, ...]:
        """Return whose turn it is, suspects' (True) or others' (False), and whose if those have nothing to send."""
        theirs = due and (self._made_way or time.monotonic() >= self._others_until)
        self._made_way = theirs and bool(in_hand)
        if self._made_way:
            self._await(in_hand)
        if self.block(in_hand):
            return ()
        if in_hand or not due:
            return (False,)
        return (True, False) if theirs else (False, True)

    def _await(self, attempt_ids: set[int]) -> None:
        self._awaited, self._since = attempt_ids, time.monotonic()
