"""Recording: the statements that write events and what is owed of them, what they take and what they answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from outbox.errors import NoSecondary
from outbox.event import SyncEvent
from outbox.schema import STAMP
from outbox.statement import Statement
from outbox.token import SyncToken

__all__ = ["ANYBODY", "RECORD", "RECORD_ONE", "Question", "is_for_nobody", "questions", "refuse_nobody", "token_of"]

# Whom the registry names, as the statement that records sees it.
_REGISTERED = """from {schema}.outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast(:backend_ids as text[]) is null or secondary.backend_id = any (cast(:backend_ids as text[])))"""
_WANTS = """(secondary.tenant_ids is null or [tenant_id] = any (secondary.tenant_ids))
      and (secondary.resource_types is null or [resource_type] = any (secondary.resource_types))"""

# Asked only when an event is owed to nobody: a second look at the registry in every statement would cost every writer.
ANYBODY = Statement("select exists (select from {schema}.outbox_secondary) as anybody")

# The transaction gets its id before it draws a position: whoever reads the sequence and then the running
# transactions has seen every writer that may still commit a lower position. Positions are drawn in the
# order given, and rows are counted back without RETURNING, so an insert-only role can record. The registry is read once
# and not for every row: its rows change every second, and where vacuum is held up it is long. What is owed to the same
# secondaries, which nearly always is all, comes back as one row: one per event took a fifth of the time. A tenant, type
# or operation that all have is sent once: drivers encode one by one.
RECORD = Statement(
    """
with writer as materialized (
    select pg_current_xact_id() as transaction_id, [stamp] as stamp,
           (cast(:tenant_ids as text[]))[1] as tenant_id, (cast(:resource_types as text[]))[1] as resource_type,
           (cast(:operations as text[]))[1] as operation
), secondary as materialized (
    select secondary.backend_id, secondary.tenant_ids, secondary.resource_types
    [registered]
), event as materialized (
    select nextval('{schema}.outbox_event_id_seq') as event_id,
           cast(hashtextextended(given.tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(given.tenant_id || '/' || given.resource_type || '/' || listed.resource_id, 0) as key_hash,
           given.tenant_id, given.resource_type, listed.resource_id, given.operation, listed.version,
           listed.fhir_version, listed.content, listed.bulk_id, listed.headers,
           writer.transaction_id, writer.stamp,
           array(select secondary.backend_id from secondary where [wants]) as owed_to
    from writer cross join unnest(
        cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:resource_ids as text[]),
        cast(:operations as text[]), cast(:versions as text[]), cast(:fhir_versions as text[]),
        cast(:contents as text[]), cast(:bulk_ids as uuid[]), cast(:headers as text[])
    ) as listed (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
    cross join lateral (
        select coalesce(listed.tenant_id, writer.tenant_id) as tenant_id,
               coalesce(listed.resource_type, writer.resource_type) as resource_type,
               coalesce(listed.operation, writer.operation) as operation
    ) as given
), written as (
    insert into {schema}.outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version,
           cast(content as json), bulk_id, cast(headers as json), stamp
    from event
), owed as (
    insert into {schema}.outbox_delivery (backend_id, lane, event_id, key_hash)
    select owed.backend_id, event.lane, event.event_id, event.key_hash
    from event cross join unnest(event.owed_to) as owed (backend_id)
)
select array_agg(event_id) as event_ids, owed_to, transaction_id, stamp
from event
group by owed_to, transaction_id, stamp
""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "given.tenant_id")
    .replace("[resource_type]", "given.resource_type")
    .replace("[stamp]", STAMP)
)

# Nearly every transaction records one event. The same without rows to join: the id comes first because a CASE asks for
# it, and what is written is given where it is written. A tenth less of the server's time than through a list of one.
RECORD_ONE = Statement(
    """
with event as materialized (
    select case when pg_current_xact_id() is not null then nextval('{schema}.outbox_event_id_seq') end as event_id,
           cast(hashtextextended([tenant_id], 0) & 63 as smallint) as lane,
           hashtextextended([tenant_id] || '/' || [resource_type] || '/' || cast(:resource_id as text), 0) as key_hash,
           pg_current_xact_id() as transaction_id, [stamp] as stamp,
           array(
    select secondary.backend_id
    [registered]
      and [wants]
           ) as owed_to
), written as (
    insert into {schema}.outbox
        (event_id, tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers,
         stamp)
    overriding system value
    select event_id, [tenant_id], [resource_type], cast(:resource_id as text), cast(:operation as text),
           cast(:version as text), cast(:fhir_version as text), cast(cast(:content as text) as json),
           cast(:bulk_id as uuid), cast(cast(:headers as text) as json), stamp
    from event
), owed as (
    insert into {schema}.outbox_delivery (backend_id, lane, event_id, key_hash)
    select unnest(owed_to), lane, event_id, key_hash from event
)
select event_id, owed_to, transaction_id, stamp from event
""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "cast(:tenant_id as text)")
    .replace("[resource_type]", "cast(:resource_type as text)")
    .replace("[stamp]", STAMP)
)

_ROWS_PER_STATEMENT = 1_000


# A statement, and what it takes.
Question: TypeAlias = tuple[Statement, dict[str, Any]]


def questions(events: Sequence[SyncEvent], backend_ids: Sequence[str] | None) -> Iterable[Question]:
    """Return what to ask, one after another, so that the events are written; the rows of all answers are its record."""
    limit = None if backend_ids is None else list(backend_ids)
    # Nearly every transaction records one event, and waits for as little of Python as there can be.
    return [(RECORD_ONE, _one(events[0], limit))] if len(events) == 1 else _by_pages(events, limit)


def is_for_nobody(rows: Sequence[Any]) -> bool:
    """Whether the record holds an event that is owed to no secondary: then ask `ANYBODY` whether there is one."""
    return not all(row[1] for row in rows)


def refuse_nobody(rows: Sequence[Any]) -> None:
    """Raise `NoSecondary` when the answer to `ANYBODY` is that no secondary was ever registered."""
    if not rows[0][0]:
        raise NoSecondary(
            "record: no secondary is registered, so nobody would ever get these events; "
            "start a relay, or call `await manager.register()`, before the first write"
        )


def token_of(rows: Sequence[Any]) -> SyncToken:
    """Return what was recorded, given the rows of all answers."""
    if not rows:
        return SyncToken.of(0, 0, [])
    recorded, backend_ids, transaction_id, stamp = rows[0]
    # PostgreSQL's transaction ids have a type of their own, which not every driver knows as a number.
    if isinstance(recorded, int):
        return SyncToken.of_one(recorded, backend_ids, int(transaction_id), stamp)
    return SyncToken.of_groups(int(transaction_id), stamp, [row[:2] for row in rows])


def _by_pages(events: Sequence[SyncEvent], backend_ids: list[str] | None) -> Iterator[Question]:
    for start in range(0, len(events), _ROWS_PER_STATEMENT):
        yield RECORD, _many(events[start : start + _ROWS_PER_STATEMENT], backend_ids)


def _one(event: SyncEvent, backend_ids: list[str] | None) -> dict[str, Any]:
    return {
        "tenant_id": event.tenant_id,
        "resource_type": event.resource_type,
        "resource_id": event.resource_id,
        "operation": str(event.operation),
        "version": event.version,
        "fhir_version": event.fhir_version,
        "content": event.content,
        "bulk_id": event.bulk_id and str(event.bulk_id),
        "headers": event.headers,
        "backend_ids": backend_ids,
    }


def _many(events: Sequence[SyncEvent], backend_ids: list[str] | None) -> dict[str, Any]:
    return {
        "tenant_ids": _once([event.tenant_id for event in events]),
        "resource_types": _once([event.resource_type for event in events]),
        "resource_ids": [event.resource_id for event in events],
        "operations": _once([str(event.operation) for event in events]),
        "versions": _some([event.version for event in events]),
        "fhir_versions": _some([event.fhir_version for event in events]),
        "contents": [event.content for event in events],
        "bulk_ids": _some([event.bulk_id and str(event.bulk_id) for event in events]),
        "headers": _some([event.headers for event in events]),
        "backend_ids": backend_ids,
    }


def _once(values: list[str]) -> list[str]:
    """Return what all of these are as one: the statement fills up with the first."""
    return values[:1] if len(set(values)) == 1 else values


def _some(values: list[Any]) -> list[Any]:
    """Return nothing where there is none: the statement fills up with nulls."""
    return values if any(values) else []
