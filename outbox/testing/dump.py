"""Dump: the end of a history, read from the tables in one snapshot and from the secondaries as a reader sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.content import content_digest
from outbox.secondaries.base import Secondary
from outbox.statement import Statement
from outbox.testing.history import History
from outbox.testing.records import Attempted, Contents, Entry, GivenUp, Held, Kept, Owed, Record, Registered

__all__ = [
    "ATTEMPTS",
    "DELIVERIES",
    "DISCARDED",
    "EVENTS",
    "HOLDS",
    "SECONDARIES",
    "dump_secondary",
    "dump_tables",
]

EVENTS = Statement("""
select event_id, tenant_id, resource_type, resource_id, cast(content as text) as content
from {schema}.outbox
order by event_id
""")

DELIVERIES = Statement("""
select backend_id, event_id from {schema}.outbox_delivery order by backend_id, event_id
""")

# Instants as whole microseconds: a double would round what a lease is judged by.
ATTEMPTS = Statement("""
select backend_id, attempt_id, cast(relay_id as text) as relay_id, event_ids,
       cast(extract(epoch from started_at) * 1000000 as bigint) as started,
       cast(coalesce(extract(epoch from finished_at) * 1000000, 0) as bigint) as finished,
       applied, stale, superseded, retried, rejected, released, lost
from {schema}.outbox_attempt
order by backend_id, attempt_id
""")

HOLDS = Statement("""
select hold.backend_id, hold.tenant_id, hold.resource_type, hold.resource_id, hold.state, hold.oldest_id,
       hold.attempts, array(
           select unnest(page.event_ids)
           from {schema}.outbox_hold as page
           where page.backend_id = hold.backend_id and page.key_hash = hold.key_hash
             and page.tenant_id = hold.tenant_id and page.resource_type = hold.resource_type
             and page.resource_id = hold.resource_id
           order by 1
       ) as event_ids
from {schema}.outbox_hold as hold
where hold.page = 0
order by hold.backend_id, hold.tenant_id, hold.resource_type, hold.resource_id
""")

DISCARDED = Statement("""
select backend_id, tenant_id, resource_type, resource_id, oldest_id, event_id
from {schema}.outbox_discarded
order by backend_id, event_id
""")

SECONDARIES = Statement("""
select backend_id, ordering, status, folded_through, applied, stale, superseded, retried, rejected, released, lost,
       discarded
from {schema}.outbox_secondary
order by backend_id
""")

_PAGE = 1_000
_COUNTS = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")


async def dump_tables(engine: AsyncEngine, schema: str, history: History) -> None:
    """Write what the tables hold, all of it in one snapshot, whatever goes on meanwhile.

    Whoever calls it adds the primary's resources (`Rows`) and what each secondary shows, and says `Dumped` when all is
    told. Memory stays bounded.
    """
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        for statement, told in _TOLD:
            stream = await connection.stream(text(statement.on(schema)))
            async for rows in stream.partitions(_PAGE):
                for record in told(rows):
                    history.write(record)


async def dump_secondary(secondary: Secondary, places: Iterable[tuple[str, str]], history: History) -> None:
    """Write what a secondary shows of these tenants and types; also when it is nothing. Raises `Unavailable`."""
    history.write(Contents(backend_id=secondary.backend_id, entries=[]))
    for place in places:
        entries: list[Entry] = []
        async for digest in secondary.scan(*place):
            entries.append(Entry(digest.position, *place, digest.resource_id, digest.digest))
            if len(entries) == _PAGE:
                history.write(Contents(backend_id=secondary.backend_id, entries=entries))
                entries = []
        if entries:
            history.write(Contents(backend_id=secondary.backend_id, entries=entries))


def _kept(rows: Sequence[Any]) -> Iterator[Record]:
    yield Kept(entries=[Entry(row.event_id, *_key(row), _digest(row.content)) for row in rows])


def _digest(content: str | None) -> str:
    return "" if content is None else content_digest(content)


def _owed(rows: Sequence[Any]) -> Iterator[Record]:
    for backend_id, group in groupby(rows, key=lambda row: row.backend_id):
        yield Owed(backend_id=backend_id, positions=[row.event_id for row in group])


def _attempted(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        yield Attempted(
            backend_id=row.backend_id,
            attempt_id=row.attempt_id,
            relay_id=row.relay_id,
            positions=row.event_ids,
            started=row.started,
            finished=row.finished,
            counts=_counts(row, *_COUNTS),
        )


def _held(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        yield Held(
            backend_id=row.backend_id,
            key=_key(row),
            state=row.state,
            positions=row.event_ids,
            oldest=row.oldest_id,
            attempts=row.attempts,
        )


def _given_up(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        yield GivenUp(backend_id=row.backend_id, key=_key(row), oldest=row.oldest_id, position=row.event_id)


def _registered(rows: Sequence[Any]) -> Iterator[Record]:
    for row in rows:
        yield Registered(
            backend_id=row.backend_id,
            ordering=row.ordering,
            status=row.status,
            folded_through=row.folded_through,
            # Never left out as empty: a total of nothing is to be believed as well.
            totals={name: getattr(row, name) for name in (*_COUNTS, "discarded")},
        )


def _counts(row: Any, *names: str) -> dict[str, int]:
    return {name: count for name in names if (count := getattr(row, name))}


def _key(row: Any) -> tuple[str, str, str]:
    return (row.tenant_id, row.resource_type, row.resource_id)


_TOLD: tuple[tuple[Statement, Callable[[Sequence[Any]], Iterator[Record]]], ...] = (
    (EVENTS, _kept),
    (DELIVERIES, _owed),
    (ATTEMPTS, _attempted),
    (HOLDS, _held),
    (DISCARDED, _given_up),
    (SECONDARIES, _registered),
)
