"""Recording: the statements that write events and what is owed of them, what they take and what they answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outbox.errors import NoSecondary
from outbox.event import SyncEvent
from outbox.schema import STAMP
from outbox.statement import Statement
from outbox.token import SyncToken

__all__ = ["RECORD", "RECORD_ONE", "recordings", "token_of"]

# Whom the registry names, as the statement that records sees it.
_REGISTERED = """from {schema}.outbox_secondary as secondary
    where secondary.status in ('shadow', 'live', 'paused')
      and (cast(:backend_ids as text[]) is null or secondary.backend_id = any (cast(:backend_ids as text[])))"""
_WANTS = """(secondary.tenant_ids is null or [tenant_id] = any (secondary.tenant_ids))
      and (secondary.resource_types is null or [resource_type] = any (secondary.resource_types))"""

# Owed to nobody, and nobody is registered: then nothing is said of it.
_ANYBODY = "(owed_to <> '{}' or exists (select from {schema}.outbox_secondary))"

# The transaction gets its id before it draws a position: whoever reads the sequence and then the running
# transactions has seen every writer that may still commit a lower position. Positions are drawn in the
# order given, and rows are counted back without RETURNING, so an insert-only role can record. The registry is read once
# and not for every row: its rows change every second, and where vacuum is held up it is long.
RECORD = Statement(
    """
with writer as materialized (
    select pg_current_xact_id() as transaction_id, [stamp] as stamp
), secondary as materialized (
    select secondary.backend_id, secondary.tenant_ids, secondary.resource_types
    [registered]
), event as materialized (
    select nextval('{schema}.outbox_event_id_seq') as event_id,
           cast(hashtextextended(tenant_id, 0) & 63 as smallint) as lane,
           hashtextextended(tenant_id || '/' || resource_type || '/' || resource_id, 0) as key_hash,
           writer.transaction_id, writer.stamp, given.*,
           array(select secondary.backend_id from secondary where [wants]) as owed_to
    from writer cross join unnest(
        cast(:tenant_ids as text[]), cast(:resource_types as text[]), cast(:resource_ids as text[]),
        cast(:operations as text[]), cast(:versions as text[]), cast(:fhir_versions as text[]),
        cast(:contents as text[]), cast(:bulk_ids as uuid[]), cast(:headers as text[])
    ) as given (tenant_id, resource_type, resource_id, operation, version, fhir_version, content, bulk_id, headers)
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
select event_id, owed_to, cast(cast(transaction_id as text) as bigint) as transaction_id, stamp, [anybody] as anybody
from event
""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "given.tenant_id")
    .replace("[resource_type]", "given.resource_type")
    .replace("[stamp]", STAMP)
    .replace("[anybody]", _ANYBODY)
)

# Nearly every transaction records one event. The same without rows to join: the id comes first because a CASE asks for
# it, and what is written is given where it is written. A tenth less of the server's time than through a list of one.
# It answers the token's text: a row of its parts costs the writer more to take apart than PostgreSQL to put together.
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
select case when [anybody] then
           concat_ws('.', to_hex(cast(cast(transaction_id as text) as bigint)), to_hex(stamp), to_hex(event_id),
                     nullif(array_to_string(owed_to, '.'), ''))
       end as token
from event
""".replace("[registered]", _REGISTERED)
    .replace("[wants]", _WANTS)
    .replace("[tenant_id]", "cast(:tenant_id as text)")
    .replace("[resource_type]", "cast(:resource_type as text)")
    .replace("[stamp]", STAMP)
    .replace("[anybody]", _ANYBODY)
)

_ROWS_PER_STATEMENT = 1_000


def recordings(
    events: Sequence[SyncEvent], backend_ids: Sequence[str] | None
) -> list[tuple[Statement, dict[str, Any]]]:
    """Return the statements that write these events in their order, and what each takes."""
    chosen = None if backend_ids is None else list(backend_ids)
    if len(events) == 1:
        return [(RECORD_ONE, _one(events[0], chosen))]
    starts = range(0, len(events), _ROWS_PER_STATEMENT)
    return [(RECORD, _many(events[start : start + _ROWS_PER_STATEMENT], chosen)) for start in starts]


def token_of(rows: Sequence[Any]) -> SyncToken:
    """Return the token of what these rows of `recordings` answered. Raises `NoSecondary`."""
    if not rows:
        return SyncToken.of(0, 0, [])
    first = rows[0]
    single = len(first) == 1
    if (first[0] is None) if single else not first[4]:
        raise NoSecondary(
            "record: no secondary is registered, so nobody would ever get these events; "
            "start a relay, or call `await manager.register()`, before the first write"
        )
    return (
        SyncToken.of_one(first[0]) if single else SyncToken.of(first[2], first[3], [(row[0], row[1]) for row in rows])
    )


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
        "tenant_ids": [event.tenant_id for event in events],
        "resource_types": [event.resource_type for event in events],
        "resource_ids": [event.resource_id for event in events],
        "operations": [str(event.operation) for event in events],
        "versions": [event.version for event in events],
        "fhir_versions": [event.fhir_version for event in events],
        "contents": [event.content for event in events],
        "bulk_ids": [event.bulk_id and str(event.bulk_id) for event in events],
        "headers": [event.headers for event in events],
        "backend_ids": backend_ids,
    }
