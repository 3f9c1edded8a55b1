"""Why: gather the story of one resource: the primary's side in one snapshot, then what each secondary answers."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from outbox.capture import Tracking
from outbox.dispatch import ask
from outbox.errors import Unavailable
from outbox.find import Asked, digest_at
from outbox.names import ACTOR, CORRELATION_ID, header_in
from outbox.secondaries.base import Findable, ResourceDigest, Secondary
from outbox.settings import SyncConfig
from outbox.source import InPrimary, Source
from outbox.statement import Statement
from outbox.story import Copy, GivenUp, Handed, Holding, KeptEvent, Standing, Story, moves_of

__all__ = ["CLOCK", "GIVEN_UP", "HANDED", "KEPT", "STANDING", "StoryTeller", "found_at"]

CLOCK = Statement("select statement_timestamp() as at")

# The outbox has no index by key, which every writer would pay for: this reads once through all that is kept.
KEPT = Statement("""
select event.event_id, event.operation, event.version,
       greatest(least(event.created_at, timestamptz '9999-01-01'), timestamptz '0001-01-02') as created_at,
       cast(event.headers as text) as headers, count(*) over () as kept
from {schema}.outbox as event
where event.tenant_id = :tenant_id and event.resource_type = :resource_type and event.resource_id = :resource_id
order by event.event_id desc
limit 100
""")

# fresh  what waits in the key's lane for the first time; the hash finds it and the key decides
# ahead  what lies before the first of them
STANDING = Statement("""
with key as materialized (
    select cast(hashtextextended(cast(:tenant_id as text), 0) & 63 as smallint) as lane,
           hashtextextended(
               cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
           ) as key_hash
)
select secondary.backend_id, secondary.status, secondary.ordering,
       (secondary.tenant_ids is null or cast(:tenant_id as text) = any (secondary.tenant_ids))
           and (secondary.resource_types is null or cast(:resource_type as text) = any (secondary.resource_types))
           as wanted,
       secondary.breaker, secondary.breaker_until, secondary.looked_at,
       greatest(statement_timestamp() - coalesce(secondary.looked_at, secondary.registered_at), interval '0')
           as silence, secondary.beyond,
       coalesce(fresh.event_ids, '{}') as pending, ahead.deliveries as ahead,
       hold.state, hold.positions, hold.attempts, hold.error_code, hold.error, hold.first_failed_at,
       hold.last_failed_at, hold.next_attempt_at
from {schema}.outbox_secondary as secondary cross join key
cross join lateral (
    select array_agg(delivery.event_id order by delivery.event_id) as event_ids
    from {schema}.outbox_delivery as delivery
    where delivery.backend_id = secondary.backend_id and delivery.lane = key.lane and delivery.key_hash = key.key_hash
      and exists (
          select from {schema}.outbox as event
          where event.event_id = delivery.event_id and event.tenant_id = :tenant_id
            and event.resource_type = :resource_type and event.resource_id = :resource_id
          offset 0
      )
) as fresh
cross join lateral (
    select count(*) as deliveries
    from (
        select from {schema}.outbox_delivery as delivery
        where delivery.backend_id = secondary.backend_id and delivery.lane = key.lane
          and delivery.event_id < fresh.event_ids[1]
        limit 10000
    ) as delivery
) as ahead
left join lateral (
    select hold.*, array(
               select unnest(page.event_ids)
               from {schema}.outbox_hold as page
               where page.backend_id = secondary.backend_id and page.key_hash = key.key_hash
                 and page.tenant_id = :tenant_id and page.resource_type = :resource_type
                 and page.resource_id = :resource_id
               order by 1
           ) as positions
    from {schema}.outbox_hold as hold
    where hold.backend_id = secondary.backend_id and hold.key_hash = key.key_hash and hold.tenant_id = :tenant_id
      and hold.resource_type = :resource_type and hold.resource_id = :resource_id and hold.page = 0
    offset 0
) as hold on true
order by secondary.backend_id
""")

# found  attempts that had the key's hash in hand: all that are open, and the latest closed ones
# mine   which of their events, as far as they are kept, are the key's
HANDED = Statement("""
with key as materialized (
    select hashtextextended(
               cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
           ) as key_hash
), found as materialized (
    select attempt.*
    from {schema}.outbox_secondary as secondary cross join key
    cross join lateral (
        select attempt.* from {schema}.outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id and attempt.finished_at is null
          and key.key_hash = any (attempt.key_hashes)
        offset 0
    ) as attempt
    union all
    select attempt.*
    from {schema}.outbox_secondary as secondary cross join key
    cross join lateral (
        select latest.*
        from (
            select attempt.* from {schema}.outbox_attempt as attempt
            where attempt.backend_id = secondary.backend_id
            order by attempt.attempt_id desc
            limit 20000
        ) as latest
        where latest.finished_at is not null and key.key_hash = any (latest.key_hashes)
        order by latest.attempt_id desc
        limit 100
    ) as attempt
)
select found.backend_id, found.attempt_id, found.relay_id, found.started_at, found.lease_until, found.finished_at,
       coalesce(mine.event_ids, '{}') as positions, cardinality(found.event_ids) as events, found.applied, found.stale,
       found.superseded, found.retried, found.rejected, found.released, found.lost, found.error_code
from found
cross join lateral (
    select array_agg(event.event_id order by event.event_id) as event_ids
    from {schema}.outbox as event
    where event.event_id = any (found.event_ids) and event.tenant_id = :tenant_id
      and event.resource_type = :resource_type and event.resource_id = :resource_id
) as mine
order by found.backend_id, found.attempt_id desc
""")

GIVEN_UP = Statement("""
select discarded.backend_id, discarded.event_id, discarded.oldest_id, discarded.attempts, discarded.error_code,
       discarded.reason, discarded.discarded_at
from {schema}.outbox_secondary as secondary
cross join lateral (
    select discarded.* from {schema}.outbox_discarded as discarded
    where discarded.backend_id = secondary.backend_id
      and discarded.key_hash = hashtextextended(
          cast(:tenant_id as text) || '/' || cast(:resource_type as text) || '/' || cast(:resource_id as text), 0
      )
      and discarded.tenant_id = :tenant_id and discarded.resource_type = :resource_type
      and discarded.resource_id = :resource_id
    offset 0
) as discarded
order by discarded.backend_id, discarded.event_id desc
""")

_LOOKS = 3
_STANDING = 11
_ANSWER_WITHIN = timedelta(seconds=5)


class StoryTeller:
    """Tells stories from the primary behind `engine` and the `secondaries` of this process, by name."""

    def __init__(
        self, engine: AsyncEngine, config: SyncConfig, tracking: Tracking, secondaries: Mapping[str, Secondary]
    ) -> None:
        self._engine = engine
        self._schema = config.database_schema
        self._silence_limit = config.unhealthy_after_silence
        self._source = Source(engine, tracking)
        self._secondaries = secondaries

    async def tell(self, asked: Asked) -> Story:
        """Return the story; looks again, twice at most, while the two sides seem to differ because one moved between.

        Nothing is open on the primary while secondaries are asked.
        """
        story = await self._look(asked)
        for _ in range(_LOOKS - 1):
            story = await self._with_copies(asked, story)
            if not any(each.copy.equal is False and not each.owed for each in story.secondaries):
                break
            again = await self._look(asked)
            if _same(story, again):
                break
            story = again
        return self._explained(await self._with_copies(asked, story))

    async def _look(self, asked: Asked) -> Story:
        async with _snapshot(self._engine) as session:
            at: datetime = (await self._rows(session, CLOCK, {}))[0].at
            primary = await self._source.in_primary(session, *asked)
            kept = await self._rows(session, KEPT, asked.parameters)
            standing = await self._rows(session, STANDING, asked.parameters)
            handed = await self._rows(session, HANDED, asked.parameters)
            given_up = await self._rows(session, GIVEN_UP, asked.parameters)
        events = tuple(_event(row) for row in kept)
        found = _standings(standing, handed, given_up)
        strangers = [Standing(name, None) for name in self._secondaries if name not in found]
        return Story(*asked, at, primary, events, kept[0].kept if kept else 0, (*found.values(), *strangers))

    async def _rows(self, session: AsyncSession, statement: Statement, parameters: dict[str, Any]) -> Any:
        return (await session.execute(text(statement.on(self._schema)), parameters)).all()

    async def _with_copies(self, asked: Asked, story: Story) -> Story:
        copies = await asyncio.gather(*(self._copy(asked, each, story.primary) for each in story.secondaries))
        told = zip(story.secondaries, copies, strict=True)
        return msgspec.structs.replace(
            story, secondaries=tuple(msgspec.structs.replace(standing, copy=copy) for standing, copy in told)
        )

    async def _copy(self, asked: Asked, standing: Standing, primary: InPrimary) -> Copy:
        secondary = self._secondaries.get(standing.backend_id)
        found = await found_at(secondary, asked)
        if isinstance(found, str):
            return Copy(unknown=found)
        present = found is not None
        here = Copy(present, found.position, found.digest) if found else Copy(present)
        if not primary.tracked:
            unknown = f"what the primary holds cannot be said: {asked.resource_type} is not tracked here"
            return msgspec.structs.replace(here, unknown=unknown)
        digest = found.digest if found else None
        return msgspec.structs.replace(here, equal=present == primary.present and digest == primary.digest)

    def _explained(self, story: Story) -> Story:
        newest = story.events[0].position if story.events else 0
        told = []
        for standing in story.secondaries:
            moves = moves_of(standing, newest, story.at, self._silence_limit)
            told.append(msgspec.structs.replace(standing, waits_for=moves.waits_for, moves_at=moves.at))
        return msgspec.structs.replace(story, secondaries=tuple(told))


async def found_at(secondary: Secondary | None, asked: Asked) -> ResourceDigest | str | None:
    """Return what a secondary holds of a resource, None when it holds nothing, or in words why nobody can say."""
    if secondary is None:
        return "what it holds cannot be said: this process does not have its adapter"
    if not isinstance(secondary, Findable):
        return "what it holds cannot be said: its adapter does not look at single resources"
    try:
        return await ask(partial(digest_at, secondary, asked), _ANSWER_WITHIN)
    except Unavailable as error:
        return f"what it holds cannot be said: it does not answer ({error.code})"


@asynccontextmanager
async def _snapshot(engine: AsyncEngine) -> AsyncIterator[AsyncSession]:
    """A session whose statements all see the primary at one moment, and change nothing."""
    async with AsyncSession(engine) as session:
        await session.connection(execution_options={"isolation_level": "REPEATABLE READ", "postgresql_readonly": True})
        yield session


def _same(one: Story, other: Story) -> bool:
    """Whether nothing was written, carried or given up for the key between two looks."""
    return one.primary == other.primary and one.events == other.events and _moving(one) == _moving(other)


def _moving(story: Story) -> list[Any]:
    return [(each.backend_id, each.pending, each.in_hand, each.held, each.attempts) for each in story.secondaries]


def _standings(standing: Iterable[Any], handed: Iterable[Any], given_up: Iterable[Any]) -> dict[str, Standing]:
    attempts: dict[str, list[Handed]] = defaultdict(list)
    for row in handed:
        attempts[row.backend_id].append(Handed(*[row[1], str(row[2]), *row[3:6], tuple(row.positions), *row[7:]]))
    notes: dict[str, list[GivenUp]] = defaultdict(list)
    for row in given_up:
        notes[row.backend_id].append(GivenUp(*row[1:]))
    return {row.backend_id: _standing(row, attempts[row.backend_id], notes[row.backend_id]) for row in standing}


def _standing(row: Any, attempts: list[Handed], notes: list[GivenUp]) -> Standing:
    *registry, pending, ahead = row[:_STANDING]
    state, positions, *rest = row[_STANDING:]
    return msgspec.structs.replace(
        Standing(*registry),
        pending=tuple(pending),
        ahead=ahead,
        in_hand=tuple(each for each in attempts if each.finished_at is None),
        held=None if state is None else Holding(state, tuple(positions), *rest),
        given_up=tuple(notes),
        attempts=tuple(attempts),
    )


def _event(row: Any) -> KeptEvent:
    headers = row.headers or ""
    named = (header_in(headers, name) for name in (CORRELATION_ID, ACTOR))
    return KeptEvent(row.event_id, row.operation, row.version, row.created_at, *named)
