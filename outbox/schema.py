"""The tables, as SQLAlchemy knows them."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    false,
    text,
)

from outbox.records import INSTANT, KEY_TEXT, backfill, discarded, now, reconciliation, secondary

__all__ = ["LANES", "LISTEN_CHANNEL", "STAMP", "metadata"]

LANES = 64
LISTEN_CHANNEL = "outbox"
STAMP = "cast(extract(epoch from transaction_timestamp()) * 1000000 as bigint)"


def metadata(schema: str = "public") -> MetaData:
    """Return the tables as SQLAlchemy knows them, in `schema`."""
    tables = MetaData(schema=schema)
    _outbox(tables)
    _delivery(tables)
    _attempt(tables)
    _hold(tables)
    discarded(tables)
    secondary(tables)
    backfill(tables)
    reconciliation(tables)
    return tables


def _outbox(tables: MetaData) -> Table:
    outbox = Table(
        "outbox",
        tables,
        Column("event_id", BigInteger, Identity(always=True), primary_key=True),
        Column("tenant_id", KEY_TEXT, nullable=False),
        Column("resource_type", KEY_TEXT, nullable=False),
        Column("resource_id", KEY_TEXT, nullable=False),
        Column("operation", Text, nullable=False),
        Column("version", Text),
        Column("fhir_version", Text),
        # json and not jsonb: the exact text goes in and comes out.
        Column("content", JSON),
        Column("bulk_id", Uuid),
        Column("headers", JSON),
        Column("created_at", INSTANT, nullable=False, server_default=now()),
        # When its transaction began, in microseconds: a crash gives the positions and the transaction ids that it
        # swallowed again, and whoever holds a token of what was lost must not take another's event for it.
        Column("stamp", BigInteger, nullable=False, server_default=text(STAMP)),
        # Measured as it is written: later it may be compressed, and whoever measured it would have to unpack it. In
        # PostgreSQL's own words, so that alembic sees no difference.
        Column("content_bytes", Integer, Computed("octet_length((content)::text)", persisted=True)),
        CheckConstraint("operation in ('create', 'update', 'delete')", name="outbox_operation_known"),
        CheckConstraint("(operation = 'delete') = (content is null)", name="outbox_only_delete_has_no_content"),
        CheckConstraint("tenant_id <> '' and resource_type <> '' and resource_id <> ''", name="outbox_key_not_empty"),
    )
    # What became of a bulk is asked by its id; whoever writes no bulk pays nothing for it.
    Index("outbox_bulk", outbox.c.bulk_id, postgresql_where=text("bulk_id is not null"))
    return outbox


def _delivery(tables: MetaData) -> Table:
    return Table(
        "outbox_delivery",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        Column("lane", SmallInteger, primary_key=True, autoincrement=False),
        Column("event_id", BigInteger, primary_key=True, autoincrement=False),
        Column("key_hash", BigInteger, nullable=False),
        CheckConstraint(f"lane between 0 and {LANES - 1}", name="outbox_delivery_lane_known"),
        # Every row is deleted soon after it is written: vacuum by number, not by share.
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.0", "autovacuum_vacuum_threshold": "20000"},
    )


def _attempt(tables: MetaData) -> Table:
    counts = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")
    attempt = Table(
        "outbox_attempt",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        Column("attempt_id", BigInteger, Identity(always=True), primary_key=True),
        Column("relay_id", Uuid, nullable=False),
        Column("event_ids", ARRAY(BigInteger), nullable=False),
        Column("key_hashes", ARRAY(BigInteger), nullable=False),
        Column("started_at", INSTANT, nullable=False, server_default=now()),
        Column("lease_until", INSTANT, nullable=False),
        Column("finished_at", INSTANT),
        *(Column(name, Integer, nullable=False, server_default="0") for name in counts),
        Column("error_code", Text),
        # Room on the page, so that heartbeats stay HOT and never touch an index.
        postgresql_with={"fillfactor": "70"},
    )
    # Every claim asks for the open ones, which are few among all that were closed since the last fold.
    Index(
        "outbox_attempt_open", attempt.c.backend_id, attempt.c.attempt_id, postgresql_where=text("finished_at is null")
    )
    return attempt


def _hold(tables: MetaData) -> Table:
    hold = Table(
        "outbox_hold",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        # The hash follows from the key. It stands here so that one index serves whoever knows the key, only its hash,
        # or neither: with two to choose from, a planner that believes the table empty takes either.
        Column("key_hash", BigInteger, primary_key=True, autoincrement=False),
        Column("tenant_id", KEY_TEXT, primary_key=True),
        Column("resource_type", KEY_TEXT, primary_key=True),
        Column("resource_id", KEY_TEXT, primary_key=True),
        # In log order a key may owe more than a row should hold, which is written anew with every attempt: what comes
        # after lies behind it, page by page, in rows that only have their events.
        Column("page", Integer, primary_key=True, autoincrement=False, server_default="0"),
        # What the hold owes, in order; empty while an attempt has it in hand.
        Column("event_ids", ARRAY(BigInteger), nullable=False),
        # The lowest position the hold stands for: of its key nothing from there on is done, superseded or not.
        Column("oldest_id", BigInteger, nullable=False),
        Column("owed_since", INSTANT, nullable=False),
        Column("state", Text, nullable=False),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("lost", Integer, nullable=False, server_default="0"),
        # Set for an event that may have killed or hung its relay: it is dispatched with nobody beside it.
        Column("alone", Boolean, nullable=False, server_default=false()),
        Column("first_failed_at", INSTANT),
        Column("last_failed_at", INSTANT),
        Column("next_attempt_at", INSTANT),
        Column("error_code", Text),
        Column("error", Text),
        CheckConstraint("state in ('released', 'retrying', 'dead', 'behind')", name="outbox_hold_state_known"),
        CheckConstraint("(state = 'behind') = (page > 0)", name="outbox_hold_page_behind"),
        CheckConstraint("length(error) <= 1024", name="outbox_hold_error_short"),
        CheckConstraint("attempts >= 0 and lost >= 0", name="outbox_hold_counts_not_negative"),
        CheckConstraint("state <> 'dead' or next_attempt_at is null", name="outbox_hold_dead_never_due"),
        postgresql_with={"fillfactor": "80"},
    )
    Index(
        "outbox_hold_due",
        hold.c.backend_id,
        hold.c.alone,
        hold.c.next_attempt_at,
        postgresql_where=text("next_attempt_at is not null"),
    )
    Index(
        "outbox_hold_in_hand",
        hold.c.backend_id,
        postgresql_where=text("next_attempt_at is null and state <> 'dead'"),
    )
    return hold
