"""The six tables, and how a statement finds them.

Statements are SQL text with named parameters (`:backend_id`) and tables qualified by `{schema}`; they are rendered once
for each schema and driver. The schema's name is the only thing ever put into a statement, it must match
`[a-z_][a-z0-9_]*` and is quoted. States stand as literals: a state in a parameter hides the partial indexes from a
generic plan.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
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
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.url import URL
from sqlalchemy.sql.compiler import SQLCompiler

from outbox.errors import SettingsError

__all__ = ["LANES", "LISTEN_CHANNEL", "Statement", "check_identifier", "dialect_of", "metadata"]

LANES = 64
LISTEN_CHANNEL = "outbox"

_IDENTIFIER = re.compile("[a-z_][a-z0-9_]{0,62}")

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


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement, as it is read; its drivers' forms are derived."""

    sql: str

    def on(self, schema: str) -> str:
        """Return the statement for one schema, still with named parameters."""
        return _qualified(self.sql, schema)

    def asyncpg(self, schema: str) -> tuple[str, tuple[str, ...]]:
        """Return the statement with `$n` parameters, and the parameters' names in that order."""
        return _positional(self.sql, schema)

    def arguments(self, schema: str, parameters: dict[str, Any]) -> tuple[Any, ...]:
        """Return the statement and its arguments as asyncpg's methods take them."""
        rendered, names = self.asyncpg(schema)
        return (rendered, *(parameters[name] for name in names))


@cache
def _qualified(sql: str, schema: str) -> str:
    check_identifier(schema)
    return sql.replace("{schema}", f'"{schema}"')


@cache
def _positional(sql: str, schema: str) -> tuple[str, tuple[str, ...]]:
    compiled = text(_qualified(sql, schema)).compile(dialect=dialect_of("asyncpg"))
    assert isinstance(compiled, SQLCompiler)
    return str(compiled), tuple(compiled.positiontup or ())


def check_identifier(schema: str) -> None:
    """Raise `SettingsError` unless a schema's name needs no quoting: it is the only name ever put into a statement."""
    if not _IDENTIFIER.fullmatch(schema):
        raise SettingsError("database_schema", "must match [a-z_][a-z0-9_]{0,62}")


def dialect_of(driver: str) -> Dialect:
    """Return SQLAlchemy's PostgreSQL dialect for a driver, which knows its way of naming parameters."""
    return URL.create(f"postgresql+{driver}").get_dialect()()
