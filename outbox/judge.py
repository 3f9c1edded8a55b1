"""Judge: tell drift from what is only on its way, by looks that leave no room for anything in between.

A look reads, in this order: E, the events of the keys; P, the primary's rows; O, what is owed; S, the secondary's; P
and E again. A resource is drift when S differs from P, O is nothing, and neither P nor E changed. Why that is never
false: what P shows had committed its event before O was read, so with nothing owed the secondary held it, or something
newer, when S was read. Something newer is an event committed after P was read, and so it is in the second E only.
Positions do not show it: of two changes in one commit, back to where it was, both may be lower than others long seen.

E is read above a floor only: a position below which nobody can commit an event any more, as for a relay's lanes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from datetime import timedelta
from itertools import count
from typing import Any, Literal

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.listing import PrimaryRow, closed
from outbox.secondaries.base import Findable, Refreshable, ResourceDigest, Secondary
from outbox.source import Source
from outbox.statement import Statement
from outbox.writers import still_writing, writers

__all__ = ["NOW", "OWED", "RECENT", "SAID_SINCE", "Drift", "Judge", "Patience", "Verdict"]

_Kind = Literal["missing", "extra", "stale", "altered"]

NOW = Statement("""
select clock_timestamp() as at, coalesce((select max(event_id) from {schema}.outbox), 0) as position
""")

# Keys are compared by hash: a collision calls something owed that is not, and never the other way round.
OWED = Statement("""
with suspect as materialized (
    select suspect.resource_id,
           hashtextextended(
               cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || suspect.resource_id, 0
           ) as key_hash
    from unnest(cast(:resource_ids as text[])) as suspect (resource_id)
), owed as materialized (
    select delivery.key_hash, 'owed' as why
    from {schema}.outbox_delivery as delivery
    where delivery.backend_id = :backend_id
      and delivery.lane = cast(hashtextextended(cast(:tenant_id as text), 0) & 63 as smallint)
      and delivery.key_hash in (select key_hash from suspect)
    union all
    select unnest(attempt.key_hashes), 'owed'
    from {schema}.outbox_secondary as secondary
    join {schema}.outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where secondary.backend_id = :backend_id and attempt.finished_at is null
    union all
    select hold.key_hash, case hold.state when 'dead' then 'dead' when 'retrying' then 'failing' else 'owed' end
    from {schema}.outbox_hold as hold
    where hold.backend_id = :backend_id
)
select suspect.resource_id, min(owed.why) as why
from suspect join owed on owed.key_hash = suspect.key_hash
group by suspect.resource_id
""")

RECENT = Statement("""
select event.resource_id, array_agg(event.event_id order by event.event_id) as positions
from {schema}.outbox as event
where event.event_id > :floor and event.tenant_id = :tenant_id and event.resource_type = :resource_type
  and event.resource_id = any (cast(:resource_ids as text[]))
group by event.resource_id
""")

# Since which position the primary says what it says now: whoever holds that or more is not behind. The newest one may
# say the same again, to one other secondary that was repaired or filled. Events have no index by key, which every
# writer would pay for: this reads all that are kept, once for many keys.
SAID_SINCE = Statement("""
with kept as materialized (
    select event.resource_id, event.event_id, md5(cast(event.content as text)) as said,
           first_value(md5(cast(event.content as text)))
               over (partition by event.resource_id order by event.event_id desc) as newest
    from {schema}.outbox as event
    where event.tenant_id = :tenant_id and event.resource_type = :resource_type
      and event.resource_id = any (cast(:resource_ids as text[]))
), judged as (
    select kept.resource_id, kept.event_id,
           max(kept.event_id) filter (where kept.said is distinct from kept.newest)
               over (partition by kept.resource_id) as otherwise
    from kept
)
select judged.resource_id, min(judged.event_id) as position
from judged
where judged.event_id > coalesce(judged.otherwise, 0)
group by judged.resource_id
""")

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 0.5
# A key that is written all the time is let be after so many looks.
_LOOKS = 10
# Before the first look writers are waited for this often: until they have ended there is no floor, and all are read.
_GLANCES = 5


class Drift(msgspec.Struct, frozen=True):
    """One resource that differs. `position` is what the secondary holds, None where it holds nothing."""

    kind: _Kind
    tenant_id: str
    resource_type: str
    resource_id: str
    position: int | None


class Verdict(msgspec.Struct):
    """What became of suspects: those that differ, and how many of the others there were, by what they were doing.

    `moved` changed, or arrived, while they were looked at; `owed` is still under way; `failing` and `dead` wait for
    what their failures wait for.
    """

    drifts: list[Drift] = msgspec.field(default_factory=list)
    others: Counter[str] = msgspec.field(default_factory=Counter)


class Patience:
    """How long one comparison, all in all, waits for deliveries under way."""

    def __init__(self, whole: timedelta) -> None:
        self._left = whole.total_seconds()

    async def wait(self, seconds: float) -> bool:
        """Sleep, and tell whether there was anything left to spend."""
        seconds = min(seconds, self._left)
        started = time.monotonic()
        await asyncio.sleep(seconds)
        self._left -= time.monotonic() - started
        return seconds > 0


class Judge:
    """Judges suspects of one secondary."""

    def __init__(
        self, engine: AsyncEngine, schema: str, source: Source, secondary: Secondary, patience: Patience
    ) -> None:
        self._engine = engine
        self._schema = schema
        self._source = source
        self._secondary = secondary
        self._patience = patience
        self._floor = 0
        self._next_floor = 0
        self._below: set[str] = set()

    async def judge(self, tenant_id: str, resource_type: str, names: Sequence[str]) -> Verdict:
        """Look at up to a thousand suspects, in order, until each is drift, equal, or out of patience."""
        scope = (tenant_id, resource_type)
        verdict = Verdict()
        held: _Held = {}
        await self._find_floor()
        undecided, pause = list(names), _FIRST_PAUSE
        for looks in count(1):
            waiting = await self._look(scope, undecided, held, verdict)
            undecided = list(waiting)
            busy = any(why != "moved" for why in waiting.values())
            if not waiting or (looks >= _LOOKS and not busy) or not await self._patience.wait(pause):
                break
            pause = min(pause * 2, _LONGEST_PAUSE)
        verdict.others.update(waiting.values())
        verdict.drifts += await self._named(scope, held)
        return verdict

    async def position(self) -> Any:
        """Return (at, position): the primary's time, and the newest position that is committed."""
        async with self._engine.connect() as connection:
            return (await connection.execute(text(NOW.on(self._schema)))).one()

    async def _look(self, scope: _Scope, names: Sequence[str], held: _Held, verdict: Verdict) -> dict[str, str]:
        """Decide what can be decided; return the rest, with what it is doing."""
        await self._raise_floor()
        before = await self._ask(RECENT, scope, names, floor=self._floor)
        ours = await self._source.find(*scope, names)
        owed = await self._ask(OWED, scope, names, backend_id=self._secondary.backend_id)
        theirs = {seen.resource_id: seen for seen in await self._seen(scope, names)}
        again = await self._source.find(*scope, names)
        after = await self._ask(RECENT, scope, names, floor=self._floor)
        waiting = {}
        for name in names:
            mine, seen = ours.get(name), theirs.get(name)
            if mine != again.get(name) or before.get(name) != after.get(name):
                waiting[name] = "moved"
            elif _equal(mine, seen):
                verdict.others["moved"] += 1
            elif owed.get(name) == "dead":
                verdict.others["dead"] += 1
            elif name in owed:
                waiting[name] = owed[name]
            else:
                held[name] = (mine is not None, seen)
        return waiting

    async def _find_floor(self) -> None:
        for _ in range(_GLANCES):
            if self._floor or await self._raise_floor() or not await self._patience.wait(_FIRST_PAUSE):
                return

    async def _raise_floor(self) -> bool:
        """Raise the floor to the position last noted once all have ended who wrote at that moment; note the next."""
        async with self._engine.connect() as connection:
            if not self._below:
                # In this order: whoever has drawn up to it and is not seen writing has committed by now, or never will.
                self._next_floor = (await connection.execute(text(NOW.on(self._schema)))).one().position
                self._below = await writers(connection, self._schema)
            else:
                self._below = still_writing(self._below, await writers(connection, self._schema))
        if not self._below:
            self._floor = self._next_floor
        return not self._below

    async def _seen(self, scope: _Scope, names: Sequence[str]) -> Sequence[ResourceDigest]:
        if isinstance(self._secondary, Refreshable):
            await self._secondary.refresh()
        if isinstance(self._secondary, Findable):
            return await self._secondary.find(*scope, names)
        wanted = set(names)
        first, last = min(names, key=str.encode), max(names, key=str.encode)
        async with closed(_until(self._secondary.scan(*scope, first[:-1] or None), last)) as listing:
            return [seen async for seen in listing if seen.resource_id in wanted]

    async def _named(self, scope: _Scope, held: _Held) -> list[Drift]:
        differing = [name for name, (here, seen) in held.items() if here and seen is not None]
        since = await self._ask(SAID_SINCE, scope, differing) if differing else {}
        return [
            Drift(_kind(here, seen, since.get(name)), *scope, name, None if seen is None else seen.position)
            for name, (here, seen) in held.items()
        ]

    async def _ask(self, statement: Statement, scope: _Scope, names: Sequence[str], **more: Any) -> dict[str, Any]:
        parameters = {"tenant_id": scope[0], "resource_type": scope[1], "resource_ids": list(names), **more}
        async with self._engine.connect() as connection:
            rows = await connection.execute(text(statement.on(self._schema)), parameters)
            return {row[0]: row[-1] for row in rows}


_Scope = tuple[str, str]
# By id: whether the primary has it, and what the secondary holds.
_Held = dict[str, tuple[bool, ResourceDigest | None]]


def _equal(mine: PrimaryRow | None, seen: ResourceDigest | None) -> bool:
    if mine is None or seen is None:
        return mine is None and seen is None
    return mine.digest == seen.digest


def _kind(here: bool, seen: ResourceDigest | None, since: int | None) -> _Kind:
    if seen is None:
        return "missing"
    if not here:
        return "extra"
    return "stale" if since is not None and since > seen.position else "altered"


async def _until(listing: AsyncIterator[ResourceDigest], last: str) -> AsyncGenerator[ResourceDigest, None]:
    async with closed(listing) as held:
        async for seen in held:
            if seen.resource_id.encode() > last.encode():
                return
            yield seen
