"""Records: the tables beside the path of a delivery: the registry, and what is written down to be looked up."""

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
    Table,
    Text,
    func,
    text,
)

__all__ = ["INSTANT", "KEY_TEXT", "backfill", "discarded", "now", "reconciliation", "secondary"]

KEY_TEXT = Text(collation="C")
INSTANT = DateTime(timezone=True)


def now() -> Any:
    """Return wall time, not the transaction's start: a lease made late in it must not be born expired."""
    return func.clock_timestamp()


def discarded(tables: MetaData) -> Table:
    """What an operator gave up, for as long as its events are kept."""
    discarded = Table(
        "outbox_discarded",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        Column("key_hash", BigInteger, primary_key=True, autoincrement=False),
        # The newest event that was given up, and the lowest position it stood for.
        Column("event_id", BigInteger, primary_key=True, autoincrement=False),
        Column("oldest_id", BigInteger, nullable=False),
        Column("tenant_id", KEY_TEXT, nullable=False),
        Column("resource_type", KEY_TEXT, nullable=False),
        Column("resource_id", KEY_TEXT, nullable=False),
        Column("events", Integer, nullable=False),
        Column("attempts", Integer, nullable=False),
        Column("error_code", Text),
        Column("reason", Text, nullable=False),
        Column("discarded_at", INSTANT, nullable=False, server_default=now()),
        CheckConstraint("length(reason) between 1 and 1024", name="outbox_discarded_reason_short"),
    )
    Index("outbox_discarded_age", discarded.c.discarded_at)
    return discarded


def secondary(tables: MetaData) -> Table:
    """The registry: one row per secondary."""
    totals = ("applied", "stale", "superseded", "retried", "rejected", "released", "lost")
    return Table(
        "outbox_secondary",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        Column("role", Text, nullable=False, server_default="search"),
        Column("mode", Text, nullable=False, server_default="asynchronous"),
        Column("ordering", Text, nullable=False, server_default="state"),
        Column("tenant_ids", ARRAY(Text)),
        Column("resource_types", ARRAY(Text)),
        Column("status", Text, nullable=False, server_default="live"),
        Column("breaker", Text, nullable=False, server_default="closed"),
        Column("breaker_failures", Integer, nullable=False, server_default="0"),
        Column("breaker_opens", Integer, nullable=False, server_default="0"),
        Column("breaker_until", INSTANT),
        Column("breaker_ramp", Integer),
        # Attempts up to here are closed and counted in the totals below.
        Column("folded_through", BigInteger, nullable=False, server_default="0"),
        *(Column(name, BigInteger, nullable=False, server_default="0") for name in totals),
        Column("discarded", BigInteger, nullable=False, server_default="0"),
        Column("last_success_at", INSTANT),
        Column("last_error_at", INSTANT),
        Column("last_error_code", Text),
        # When a relay last asked what is due, within a moment: the sign of life of all relays together.
        Column("looked_at", INSTANT),
        # Which history of the primary it was last kept in step with, and since when that may be another one.
        Column("epoch", Text),
        Column("doubted_at", INSTANT),
        # A position it holds that the primary has not given; nothing is carried to it until positions are past that.
        Column("beyond", BigInteger),
        # When a relay last worked at comparing it with the primary in the background, and where that stands; null when
        # the last comparison came to its end.
        Column("proof_at", INSTANT),
        Column("proof_standing", JSON),
        Column("registered_at", INSTANT, nullable=False, server_default=now()),
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


def backfill(tables: MetaData) -> Table:
    """How far a backfill is: one row per secondary, tenant and type."""
    return Table(
        "outbox_backfill",
        tables,
        Column("backend_id", KEY_TEXT, primary_key=True),
        Column("tenant_id", KEY_TEXT, primary_key=True),
        Column("resource_type", KEY_TEXT, primary_key=True),
        # Everything up to this primary key, a JSON array of its parts as text, has its event; null before the first.
        Column("after", KEY_TEXT),
        Column("recorded", BigInteger, nullable=False, server_default="0"),
        # Rows that no event can carry exactly.
        Column("refused", BigInteger, nullable=False, server_default="0"),
        # How many there were when it began, for who wants to know how long it takes.
        Column("total", BigInteger),
        Column("started_at", INSTANT, nullable=False, server_default=now()),
        Column("advanced_at", INSTANT, nullable=False, server_default=now()),
        Column("finished_at", INSTANT),
    )


def reconciliation(tables: MetaData) -> Table:
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
        Column("backend_id", KEY_TEXT, nullable=False),
        # Null: all of them.
        Column("tenant_id", KEY_TEXT),
        Column("resource_type", KEY_TEXT),
        Column("repair", Boolean, nullable=False),
        Column("actor", Text, nullable=False),
        Column("reason", Text, nullable=False),
        # Whatever was recorded up to this position was taken into account.
        Column("high_water", BigInteger, nullable=False),
        *(Column(name, BigInteger, nullable=False) for name in counts),
        Column("started_at", INSTANT, nullable=False),
        Column("finished_at", INSTANT, nullable=False, server_default=now()),
        CheckConstraint("length(reason) <= 1024 and length(actor) <= 256", name="outbox_reconciliation_words_short"),
    )
    # Status asks for the latest that left nothing out.
    Index(
        "outbox_reconciliation_whole",
        reconciliation.c.backend_id,
        reconciliation.c.finished_at,
        postgresql_where=text("tenant_id is null and resource_type is null"),
    )
    return reconciliation
