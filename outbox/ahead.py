"""Ahead: a secondary that holds what the primary has not given, because the primary's history went back.

It would refuse every new event as older than what it has until positions pass that, and all would count as done. So
whoever carries asks it first how far it is: at the start of a relay, and whenever the primary failed or may be another
one. If it is ahead, the registry says so, nothing is carried to it by anybody, and `move_past` is what ends that.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from datetime import timedelta

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.dispatch import highest_of
from outbox.epoch import doubt
from outbox.errors import SecondaryError, Unavailable
from outbox.lanes import HIGHEST
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.register import Registration
from outbox.secondaries.base import Positioned, Secondary
from outbox.settings import SyncConfig
from outbox.statement import Statement

__all__ = ["CLEAR", "HELD_BACK", "LOCK", "MOVE", "PATIENCE", "Ahead", "Moved", "highest_positions", "move_past"]

_log = logging.getLogger("outbox.relay")

# Half of all there are: whoever claims to be further is wrong about it, and positions cannot be moved back.
_FURTHEST = 2**62

PATIENCE = Statement("select set_config('lock_timeout', :patience, true)")

# Changes nothing. It waits for everybody who drew a position to end, and lets nobody draw one until the move is over:
# `setval` would else take back what somebody got in between.
LOCK = Statement("alter sequence {schema}.outbox_event_id_seq increment by 1")

HELD_BACK = Statement("select coalesce(max(beyond), 0) from {schema}.outbox_secondary")

MOVE = Statement("""
with given as materialized (
    select case when is_called then last_value else 0 end as highest from {schema}.outbox_event_id_seq
), reached as materialized (
    select greatest(
        cast(:seen as bigint),
        (select max(event_id) from {schema}.outbox),
        (select max(event_id) from {schema}.outbox_delivery)
    ) as highest
)
select given.highest as before,
       case when reached.highest > given.highest
            then setval('{schema}.outbox_event_id_seq', reached.highest)
            else given.highest end as after
from given cross join reached
""")

# What was written since history went back may have been refused as old: only a comparison brings certainty.
CLEAR = Statement("""
update {schema}.outbox_secondary
set beyond = null, doubted_at = statement_timestamp()
where beyond <= cast(:after as bigint)
   or backend_id = any (cast(:ahead as text[]))
returning backend_id
""")


class Ahead:
    """Asks one secondary how far it is before a relay carries to it; again after `doubt`."""

    def __init__(self, secondary: Secondary, primary: Primary, config: SyncConfig) -> None:
        self._secondary = secondary
        self._primary = primary
        self._config = config
        self._asking = asyncio.Lock()
        self._doubts = 1
        self._answered = 0

    def doubt(self) -> None:
        """Ask again before the next batch: the primary failed, or may be another one."""
        self._doubts += 1

    async def check(self) -> None:
        """Return when nothing says that it is ahead; raise `Unavailable` when it is, or when it does not answer."""
        if self._answered == self._doubts or not isinstance(self._secondary, Positioned):
            return
        async with self._asking:
            if (doubts := self._doubts) == self._answered:
                return
            # Asked in this order: what is there by now was given before.
            held = await highest_of(self._secondary, self._config.attempt_deadline)
            given = await self._given(held)
            if held > given:
                raise Unavailable("ahead", f"it holds position {held}, and the primary has given {given}")
            self._answered = doubts

    async def _given(self, held: int) -> int:
        """Return the highest position that was given, once the registry says if that is too little."""
        schema, backend_id = self._config.database_schema, self._secondary.backend_id
        for failures in itertools.count(1):
            try:
                async with self._primary.connection() as connection:
                    given = int(await connection.fetchval(HIGHEST.on(schema)))
                    if held > given:
                        await doubt(connection, schema, backend_id, held)
            except PRIMARY_FAILED as error:
                _log.warning("%s: comparing positions failed (%s)", backend_id, code_of(error))
                await self._primary.recover(failures)
                continue
            if held > given:
                self._tell(held, given)
            return given
        raise AssertionError("counting never ends")

    def _tell(self, held: int, given: int) -> None:
        backend_id = self._secondary.backend_id
        _log.error(
            "%s: ahead of the primary: it holds position %d, the primary has given %d; nothing is carried to it before "
            "`outbox doctor --repair`",
            backend_id,
            held,
            given,
            extra={"outbox_backend_id": backend_id, "outbox_error_code": "ahead"},
        )


class Moved(msgspec.Struct, frozen=True):
    """What `move_past` did: the highest position given `before` and `after`, and how far each secondary was.

    `ahead` names those that were beyond what was given: until they are reconciled it is not known what they hold. Those
    in `unasked` cannot say how far they are, or did not answer; a relay asks the latter before it carries to them.
    """

    before: int
    after: int
    positions: dict[str, int]
    ahead: tuple[str, ...]
    unasked: tuple[str, ...]


async def highest_positions(registrations: Sequence[Registration], deadline: timedelta) -> dict[str, int | None]:
    """Return how far each secondary is, all asked at once; None for one that cannot say or did not."""
    answers = await asyncio.gather(*(_position_of(each.secondary, deadline) for each in registrations))
    return {each.backend_id: answer for each, answer in zip(registrations, answers, strict=True)}


async def move_past(engine: AsyncEngine, config: SyncConfig, registrations: Sequence[Registration]) -> Moved:
    """Let the next position be above all that any secondary holds; never lower it. Safe while writers write.

    They wait for it, for a moment: it is over at once, or fails after a second behind somebody who keeps a transaction
    open. Raises `SecondaryError` for what is too far to be true.
    """
    answers = await highest_positions(registrations, config.attempt_deadline)
    positions = {name: position for name, position in answers.items() if position is not None}
    schema = config.database_schema
    async with engine.begin() as connection:
        held_back = int((await connection.execute(text(HELD_BACK.on(schema)))).scalar_one())
        seen = max([held_back, *positions.values()])
        if seen > _FURTHEST:
            raise SecondaryError(f"a secondary says that it holds position {seen}: too far to be moved past")
        await connection.execute(text(PATIENCE.on(schema)), {"patience": "1s"})
        await connection.execute(text(LOCK.on(schema)))
        before, after = (await connection.execute(text(MOVE.on(schema)), {"seen": seen})).one()
        ahead = [name for name, position in positions.items() if position > before]
        parameters = {"after": after, "ahead": ahead}
        cleared = (await connection.execute(text(CLEAR.on(schema)), parameters)).scalars().all()
    unasked = tuple(sorted(answers.keys() - positions.keys()))
    return Moved(before, after, positions, tuple(sorted({*ahead, *cleared})), unasked)


async def _position_of(secondary: Secondary, deadline: timedelta) -> int | None:
    if not isinstance(secondary, Positioned):
        return None
    try:
        return await highest_of(secondary, deadline)
    except Unavailable:
        return None
