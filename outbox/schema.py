"""The tables, as SQLAlchemy knows them."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    MetaData,
    SmallInteger,
    Table,
    Text,
    Uuid,
    false,
    func,
    text,
)

__all__ = ["LANES", "LISTEN_CHANNEL", "metadata"]

LANES = 64
LISTEN_CHANNEL = "outbox"

_KEY_TEXT = Text(collation="C")
_INSTANT = DateTime(timezone=True)


def _now() -> Any:
    # Wall time, not the transaction's start: a lease made late in a long transaction must not be born expired.
    return func.clock_timestamp()


def metadata(schema: str = "public") -> MetaData:
    """Return the tables as SQLAlchemy knows them, in `schema`."""
    tables = MetaData(schema=schema)
    _outbox(tables)
    _delivery(tables)
    _attempt(tables)
    _hold(tables)
    _discarded(tables)
    _secondary(tables)
    _backfill(tables)
    _reconciliation(tables)
    return tables


def _outbox(tables: MetaData) -> Table:
    outbox = Table(
        "outbox",
        tables,
        Column("event_id", BigInteger, Identity(always=True), primary_key=True),
        Column("tenant_id", _KEY_TEXT, nullable=False),
        Column("resource_type", _KEY_TEXT, nullable=False),
        Column("resource_id", _KEY_TEXT, nullable=False),
        Column("operation", Text, nullable=False),
        Column("version", Text),
        Column("fhir_version", Text),
        # json and not jsonb: the exact text goes in and comes out.
        Column("content", JSON),
        Column("bulk_id", Uuid),
        Column("headers", JSON),
        Column("created_at", _INSTANT, nullable=False, server_default=_now()),
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
        Column("backend_id", _KEY_TEXT, primary_key=True),
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
        Column("backend_id", _KEY_TEXT, primary_key=True),
        Column("attempt_id", BigInteger, Identity(always=True), primary_key=True),
        Column("relay_id", Uuid, nullable=False),
        Column("event_ids", ARRAY(BigInteger), nullable=False),
        Column("key_hashes", ARRAY(BigInteger), nullable=False),
        Column("started_at", _INSTANT, nullable=False, server_default=_now()),
        Column("lease_until", _INSTANT, nullable=False),
        Column("finished_at", _INSTANT),
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
        Column("backend_id", _KEY_TEXT, primary_key=True),
        # The hash follows from the key. It stands here so that one index serves whoever knows the key, only its hash,
        # or neither: with two to choose from, a planner that believes the table empty takes either.
        Column("key_hash", BigInteger, primary_key=True, autoincrement=False),
        Column("tenant_id", _KEY_TEXT, primary_key=True),
        Column("resource_type", _KEY_TEXT, primary_key=True),
        Column("resource_id", _KEY_TEXT, primary_key=True),
        # What the hold owes, in order; empty while an attempt has it in hand.
        Column("event_ids", ARRAY(BigInteger), nullable=False),
        # The lowest position the hold stands for: of its key nothing from there on is done, superseded or not.
        Column("oldest_id", BigInteger, nullable=False),
        Column("owed_since", _INSTANT, nullable=False),
        Column("state", Text, nullable=False),
        Column("attempts", Integer, nullable=False, server_default="0"),
        Column("lost", Integer, nullable=False, server_default="0"),
        # Set for an event that may have killed or hung its relay: it is dispatched with nobody beside it.
        Column("alone", Boolean, nullable=False, server_default=false()),
        Column("first_failed_at", _INSTANT),
        Column("last_failed_at", _INSTANT),
        Column("next_attempt_at", _INSTANT),
        Column("error_code", Text),
        Column("error", Text),
        CheckConstraint("state in ('released', 'retrying', 'dead')", name="outbox_hold_state_known"),
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


def _discarded(tables: MetaData) -> Table:
    """What an operator gave up, for as long as its events are kept."""
    discarded = Table(
        "outbox_discarded",
        tables,
        Column("backend_id", _KEY_TEXT, primary_key=True),
        Column("key_hash", BigInteger, primary_key=True, autoincrement=False),
        # The newest event that was given up, and the lowest position it stood for.
        Column("event_id", BigInteger, primary_key=True, autoincrement=False),
        Column("oldest_id", BigInteger, nullable=False),
        Column("tenant_id", _KEY_TEXT, nullable=False),
        Column("resource_type", _KEY_TEXT, nullable=False),
        Column("resource_id", _KEY_TEXT, nullable=False),
        Column("events", Integer, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error_code", Text),
        Column("reason", Text, nullable=False),
        Column("discarded_at", _INSTANT, nullable=False, server_default=_now()),
        CheckConstraint("length(reason) between 1 and 1024", name="outbox_discarded_reason_short"),
    )
    Index("outbox_discarded_age", discarded.c.discarded_at)
    return discarded


def _secondary(tables: MetaData) -> Table:
    totals = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")
    return Table(
        "outbox_secondary",
        tables,
        Column("backend_id", _KEY_TEXT, primary_key=True),
        Column("role", Text, nullable=False, server_default="search"),
        Column("mode", Text, nullable=False, server_default="asynchronous"),
        Column("ordering", Text, nullable=False, server_default="state"),
        Column("tenant_ids", ARRAY(Text)),
        Column("resource_types", ARRAY(Text)),
        Column("status", Text, nullable=False, server_default="live"),
        Column("breaker", Text, nullable=False, server_default="closed"),
        Column("breaker_failures", Integer, nullable=False, server_default="0"),
        Column("breaker_opens", Integer, nullable=False, server_default="0"),
        Column("breaker_until", _INSTANT),
        Column("breaker_ramp", Integer),
        # Attempts up to here are closed and counted in the totals below.
        Column("folded_through", BigInteger, nullable=False, server_default="0"),
        *(Column(name, BigInteger, nullable=False, server_default="0") for name in totals),
        Column("discarded", BigInteger, nullable=False, server_default="0"),
        Column("last_success_at", _INSTANT),
        Column("last_error_at", _INSTANT),
        Column("last_error_code", Text),
        # When a relay last asked what is due, within a moment: the sign of life of all relays together.
        Column("looked_at", _INSTANT),
        Column("registered_at", _INSTANT, nullable=False, server_default=_now()),
        CheckConstraint(
            "role in ('search', 'graph', 'terminology', 'archive', 'cache')", name="outbox_secondary_role_known"
        ),
        CheckConstraint("mode in ('synchronous', 'asynchronous', 'hybrid')", name="outbox_secondary_mode_known"),
        CheckConstraint("ordering in ('state', 'log')", name="outbox_secondary_ordering_known"),
        CheckConstraint(
            "status in ('shadow', 'live', 'paused', 'draining', 'removed')", name="outbox_secondary_status_known"
        ),
        CheckConstraint("breaker in ('closed', 'open', 'half_open')", name="outbox_secondary_breaker_known"),
        postgresql_with={"fillfactor": "50"},
    )


def _backfill(tables: MetaData) -> Table:
    """How far a backfill is: one row per secondary, tenant and type."""
    return Table(
        "outbox_backfill",
        tables,
        Column("backend_id", _KEY_TEXT, primary_key=True),
        Column("tenant_id", _KEY_TEXT, primary_key=True),
        Column("resource_type", _KEY_TEXT, primary_key=True),
        # Everything up to this id has its event; null before the first page.
        Column("after", _KEY_TEXT),
        Column("recorded", BigInteger, nullable=False, server_default="0"),
        # How many there were when it began, for who wants to know how long it takes.
        Column("total", BigInteger),
        Column("started_at", _INSTANT, nullable=False, server_default=_now()),
        Column("advanced_at", _INSTANT, nullable=False, server_default=_now()),
        Column("finished_at", _INSTANT),
    )


def _reconciliation(tables: MetaData) -> Table:
    """What each comparison found and repaired, who asked for it and why."""
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
    reconciliation = Table(
        "outbox_reconciliation",
        tables,
        Column("run_id", BigInteger, Identity(always=True), primary_key=True),
        Column("backend_id", _KEY_TEXT, nullable=False),
        # Null: all of them.
        Column("tenant_id", _KEY_TEXT),
        Column("resource_type", _KEY_TEXT),
        Column("repair", Boolean, nullable=False),
        Column("actor", Text, nullable=False),
        Column("reason", Text, nullable=False),
        # Whatever was recorded up to this position was taken into account.
        Column("high_water", BigInteger, nullable=False),
        *(Column(name, BigInteger, nullable=False) for name in counts),
        Column("started_at", _INSTANT, nullable=False),
        Column("finished_at", _INSTANT, nullable=False, server_default=_now()),
        CheckConstraint("length(reason) <= 1024 and length(actor) <= 256", name="outbox_reconciliation_words_short"),
    )
    Index("outbox_reconciliation_latest", reconciliation.c.backend_id, reconciliation.c.finished_at)
    return reconciliation
