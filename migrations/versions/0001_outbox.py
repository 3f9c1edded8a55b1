"""The tables of the outbox, and the view that answers how far behind each secondary is."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = ("outbox",)
depends_on = None

COUNTS = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")
KEY = sa.Text(collation="C")
INSTANT = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")
STAMP = sa.text("cast(extract(epoch from transaction_timestamp()) * 1000000 as bigint)")
CONTENT_BYTES = "octet_length((content)::text)"

# Exact, in one snapshot. Pending is what is owed: deliveries, events in open attempts, events of holds.
# What was attempted since the last fold has an upper bound too: with one bound alone the planner expects a third of the
# table, and reads all of it.
LAG_VIEW = """
create view {schema}.outbox_lag as
with lane as (
    select secondary.backend_id, lane.lane
    from {schema}.outbox_secondary as secondary cross join generate_series(0, 63) as lane (lane)
), waiting as (
    select delivery.backend_id, count(*) as deliveries
    from {schema}.outbox_delivery as delivery group by delivery.backend_id
), oldest_waiting as (
    select lane.backend_id, min(event.created_at) as since
    from lane
    cross join lateral (
        select delivery.event_id from {schema}.outbox_delivery as delivery
        where delivery.backend_id = lane.backend_id and delivery.lane = lane.lane
        order by delivery.event_id limit 1
    ) as first
    join {schema}.outbox as event on event.event_id = first.event_id
    group by lane.backend_id
), open_attempt as (
    select attempt.backend_id, attempt.event_ids
    from {schema}.outbox_secondary as secondary
    join {schema}.outbox_attempt as attempt
      on attempt.backend_id = secondary.backend_id and attempt.attempt_id > secondary.folded_through
    where attempt.finished_at is null
), in_hand as (
    select owed.backend_id, count(*) as deliveries, min(event.created_at) as since
    from (select backend_id, unnest(event_ids) as event_id from open_attempt) as owed
    left join {schema}.outbox as event on event.event_id = owed.event_id
    group by owed.backend_id
), held as (
    select hold.backend_id,
           sum(cardinality(hold.event_ids)) as deliveries,
           min(hold.owed_since) filter (where hold.event_ids <> '{{}}') as since,
           count(*) filter (where hold.state = 'retrying') as failing,
           count(*) filter (where hold.state = 'dead') as dead
    from {schema}.outbox_hold as hold group by hold.backend_id
), recent as (
    select secondary.backend_id, sum(attempt.applied) as applied, sum(attempt.stale) as stale,
           sum(attempt.superseded) as superseded, sum(attempt.retried) as retried,
           sum(attempt.rejected) as rejected, sum(attempt.lost) as lost,
           max(attempt.finished_at) filter (where attempt.applied + attempt.stale > 0) as last_success_at,
           max(attempt.finished_at) filter (where attempt.error_code is not null) as last_error_at,
           (array_agg(attempt.error_code order by attempt.finished_at desc)
               filter (where attempt.error_code is not null))[1] as last_error_code
    from {schema}.outbox_secondary as secondary
    cross join lateral (
        select * from {schema}.outbox_attempt as attempt
        where attempt.backend_id = secondary.backend_id
          and attempt.attempt_id between secondary.folded_through + 1 and 9223372036854775807
        offset 0
    ) as attempt
    group by secondary.backend_id
)
select secondary.backend_id,
       secondary.status,
       coalesce(waiting.deliveries, 0) + coalesce(in_hand.deliveries, 0) + coalesce(held.deliveries, 0) as pending,
       coalesce(in_hand.deliveries, 0) as in_flight,
       coalesce(held.failing, 0) as failing,
       coalesce(held.dead, 0) as dead,
       greatest(statement_timestamp() - least(oldest_waiting.since, in_hand.since, held.since), interval '0') as lag,
       secondary.breaker,
       greatest(secondary.last_success_at, recent.last_success_at) as last_success_at,
       greatest(secondary.last_error_at, recent.last_error_at) as last_error_at,
       case when recent.last_error_at is null or recent.last_error_at < secondary.last_error_at
            then secondary.last_error_code else recent.last_error_code end as last_error_code,
       secondary.applied + coalesce(recent.applied, 0) as applied,
       secondary.stale + coalesce(recent.stale, 0) as stale,
       secondary.superseded + coalesce(recent.superseded, 0) as superseded,
       secondary.retried + coalesce(recent.retried, 0) as retried,
       secondary.rejected + coalesce(recent.rejected, 0) as rejected,
       secondary.lost + coalesce(recent.lost, 0) as lost,
       secondary.discarded,
       secondary.looked_at,
       secondary.beyond,
       greatest(statement_timestamp() - coalesce(secondary.looked_at, secondary.registered_at), interval '0') as silence
from {schema}.outbox_secondary as secondary
left join waiting on waiting.backend_id = secondary.backend_id
left join oldest_waiting on oldest_waiting.backend_id = secondary.backend_id
left join in_hand on in_hand.backend_id = secondary.backend_id
left join held on held.backend_id = secondary.backend_id
left join recent on recent.backend_id = secondary.backend_id
"""


def upgrade() -> None:
    schema = _schema()
    _create_outbox(schema)
    _create_delivery(schema)
    _create_attempt(schema)
    _create_hold(schema)
    _create_discarded(schema)
    _create_secondary(schema)
    _create_backfill(schema)
    _create_reconciliation(schema)
    op.execute(LAG_VIEW.format(schema=f'"{schema}"'))


def downgrade() -> None:
    schema = _schema()
    op.execute(f'drop view "{schema}".outbox_lag')
    for table in (
        "outbox_reconciliation",
        "outbox_backfill",
        "outbox_secondary",
        "outbox_discarded",
        "outbox_hold",
        "outbox_attempt",
        "outbox_delivery",
        "outbox",
    ):
        op.drop_table(table, schema=schema)


def _schema() -> str:
    """Our own runs say which schema; in an application's alembic tree it is `outbox_schema` in its configuration."""
    config = context.config
    return config.attributes.get("schema") or config.get_main_option("outbox_schema") or "public"


def _create_outbox(schema: str) -> None:
    op.create_table(
        "outbox",
        sa.Column("event_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("tenant_id", KEY, nullable=False),
        sa.Column("resource_type", KEY, nullable=False),
        sa.Column("resource_id", KEY, nullable=False),
        sa.Column("operation", sa.Text, nullable=False),
        sa.Column("version", sa.Text),
        sa.Column("fhir_version", sa.Text),
        sa.Column("content", postgresql.JSON),
        sa.Column("bulk_id", sa.Uuid),
        sa.Column("headers", postgresql.JSON),
        sa.Column("created_at", INSTANT, nullable=False, server_default=NOW),
        sa.Column("stamp", sa.BigInteger, nullable=False, server_default=STAMP),
        sa.Column("content_bytes", sa.Integer, sa.Computed(CONTENT_BYTES, persisted=True)),
        sa.CheckConstraint("operation in ('create', 'update', 'delete')", name="outbox_operation_known"),
        sa.CheckConstraint("(operation = 'delete') = (content is null)", name="outbox_only_delete_has_no_content"),
        sa.CheckConstraint(
            "tenant_id <> '' and resource_type <> '' and resource_id <> ''", name="outbox_key_not_empty"
        ),
        schema=schema,
    )
    op.create_index(
        "outbox_bulk", "outbox", ["bulk_id"], schema=schema, postgresql_where=sa.text("bulk_id is not null")
    )


def _create_delivery(schema: str) -> None:
    op.create_table(
        "outbox_delivery",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("lane", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("key_hash", sa.BigInteger, nullable=False),
        sa.CheckConstraint("lane between 0 and 63", name="outbox_delivery_lane_known"),
        schema=schema,
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.0", "autovacuum_vacuum_threshold": "20000"},
    )


def _create_attempt(schema: str) -> None:
    op.create_table(
        "outbox_attempt",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("attempt_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("relay_id", sa.Uuid, nullable=False),
        sa.Column("event_ids", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.Column("key_hashes", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.Column("started_at", INSTANT, nullable=False, server_default=NOW),
        sa.Column("lease_until", INSTANT, nullable=False),
        sa.Column("finished_at", INSTANT),
        *(sa.Column(name, sa.Integer, nullable=False, server_default="0") for name in COUNTS),
        sa.Column("error_code", sa.Text),
        schema=schema,
        postgresql_with={"fillfactor": "70"},
    )
    op.create_index(
        "outbox_attempt_open",
        "outbox_attempt",
        ["backend_id", "attempt_id"],
        schema=schema,
        postgresql_where=sa.text("finished_at is null"),
    )


def _create_hold(schema: str) -> None:
    op.create_table(
        "outbox_hold",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("key_hash", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("tenant_id", KEY, primary_key=True),
        sa.Column("resource_type", KEY, primary_key=True),
        sa.Column("resource_id", KEY, primary_key=True),
        sa.Column("page", sa.Integer, primary_key=True, autoincrement=False, server_default="0"),
        sa.Column("event_ids", sa.ARRAY(sa.BigInteger), nullable=False),
        sa.Column("oldest_id", sa.BigInteger, nullable=False),
        sa.Column("owed_since", INSTANT, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("lost", sa.Integer, nullable=False, server_default="0"),
        sa.Column("alone", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("first_failed_at", INSTANT),
        sa.Column("last_failed_at", INSTANT),
        sa.Column("next_attempt_at", INSTANT),
        sa.Column("error_code", sa.Text),
        sa.Column("error", sa.Text),
        sa.CheckConstraint("state in ('released', 'retrying', 'dead', 'behind')", name="outbox_hold_state_known"),
        sa.CheckConstraint("(state = 'behind') = (page > 0)", name="outbox_hold_page_behind"),
        sa.CheckConstraint("length(error) <= 1024", name="outbox_hold_error_short"),
        sa.CheckConstraint("attempts >= 0 and lost >= 0", name="outbox_hold_counts_not_negative"),
        sa.CheckConstraint("state <> 'dead' or next_attempt_at is null", name="outbox_hold_dead_never_due"),
        schema=schema,
        postgresql_with={"fillfactor": "80"},
    )
    op.create_index(
        "outbox_hold_due",
        "outbox_hold",
        ["backend_id", "alone", "next_attempt_at"],
        schema=schema,
        postgresql_where=sa.text("next_attempt_at is not null"),
    )
    op.create_index(
        "outbox_hold_in_hand",
        "outbox_hold",
        ["backend_id"],
        schema=schema,
        postgresql_where=sa.text("next_attempt_at is null and state <> 'dead'"),
    )


def _create_discarded(schema: str) -> None:
    op.create_table(
        "outbox_discarded",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("key_hash", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("event_id", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("oldest_id", sa.BigInteger, nullable=False),
        sa.Column("tenant_id", KEY, nullable=False),
        sa.Column("resource_type", KEY, nullable=False),
        sa.Column("resource_id", KEY, nullable=False),
        sa.Column("events", sa.Integer, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("error_code", sa.Text),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("discarded_at", INSTANT, nullable=False, server_default=NOW),
        sa.CheckConstraint("length(reason) between 1 and 1024", name="outbox_discarded_reason_short"),
        schema=schema,
    )
    op.create_index("outbox_discarded_age", "outbox_discarded", ["discarded_at"], schema=schema)


def _create_secondary(schema: str) -> None:
    op.create_table(
        "outbox_secondary",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("role", sa.Text, nullable=False, server_default="search"),
        sa.Column("mode", sa.Text, nullable=False, server_default="asynchronous"),
        sa.Column("ordering", sa.Text, nullable=False, server_default="state"),
        sa.Column("tenant_ids", sa.ARRAY(sa.Text)),
        sa.Column("resource_types", sa.ARRAY(sa.Text)),
        sa.Column("status", sa.Text, nullable=False, server_default="live"),
        sa.Column("breaker", sa.Text, nullable=False, server_default="closed"),
        sa.Column("breaker_failures", sa.Integer, nullable=False, server_default="0"),
        sa.Column("breaker_opens", sa.Integer, nullable=False, server_default="0"),
        sa.Column("breaker_until", INSTANT),
        sa.Column("breaker_ramp", sa.Integer),
        sa.Column("folded_through", sa.BigInteger, nullable=False, server_default="0"),
        *(sa.Column(name, sa.BigInteger, nullable=False, server_default="0") for name in COUNTS),
        sa.Column("discarded", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("last_success_at", INSTANT),
        sa.Column("last_error_at", INSTANT),
        sa.Column("last_error_code", sa.Text),
        sa.Column("looked_at", INSTANT),
        sa.Column("epoch", sa.Text),
        sa.Column("doubted_at", INSTANT),
        sa.Column("beyond", sa.BigInteger),
        sa.Column("proof_at", INSTANT),
        sa.Column("proof_standing", postgresql.JSON),
        sa.Column("registered_at", INSTANT, nullable=False, server_default=NOW),
        sa.CheckConstraint(
            "role in ('search', 'graph', 'terminology', 'archive', 'cache')", name="outbox_secondary_role_known"
        ),
        sa.CheckConstraint("mode in ('synchronous', 'asynchronous', 'hybrid')", name="outbox_secondary_mode_known"),
        sa.CheckConstraint("ordering in ('state', 'log')", name="outbox_secondary_ordering_known"),
        sa.CheckConstraint(
            "status in ('shadow', 'live', 'paused', 'draining', 'removed')", name="outbox_secondary_status_known"
        ),
        sa.CheckConstraint("breaker in ('closed', 'open', 'half_open')", name="outbox_secondary_breaker_known"),
        schema=schema,
        postgresql_with={"fillfactor": "50"},
    )


def _create_backfill(schema: str) -> None:
    op.create_table(
        "outbox_backfill",
        sa.Column("backend_id", KEY, primary_key=True),
        sa.Column("tenant_id", KEY, primary_key=True),
        sa.Column("resource_type", KEY, primary_key=True),
        sa.Column("after", KEY),
        sa.Column("recorded", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("refused", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("total", sa.BigInteger),
        sa.Column("started_at", INSTANT, nullable=False, server_default=NOW),
        sa.Column("advanced_at", INSTANT, nullable=False, server_default=NOW),
        sa.Column("finished_at", INSTANT),
        schema=schema,
    )


def _create_reconciliation(schema: str) -> None:
    counts = (
        "primary_count",
        "secondary_count",
        "missing",
        "extra",
        "stale",
        "altered",
        "in_flight",
        "repaired",
        "refused",
    )
    op.create_table(
        "outbox_reconciliation",
        sa.Column("run_id", sa.BigInteger, sa.Identity(always=True), primary_key=True),
        sa.Column("backend_id", KEY, nullable=False),
        sa.Column("tenant_id", KEY),
        sa.Column("resource_type", KEY),
        sa.Column("repair", sa.Boolean, nullable=False),
        sa.Column("actor", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("high_water", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in counts),
        sa.Column("started_at", INSTANT, nullable=False),
        sa.Column("finished_at", INSTANT, nullable=False, server_default=NOW),
        sa.CheckConstraint("length(reason) <= 1024 and length(actor) <= 256", name="outbox_reconciliation_words_short"),
        schema=schema,
    )
    op.create_index(
        "outbox_reconciliation_whole",
        "outbox_reconciliation",
        ["backend_id", "finished_at"],
        schema=schema,
        postgresql_where=sa.text("tenant_id is null and resource_type is null"),
    )
