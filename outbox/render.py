"""Render: what the commands show, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from outbox.judge import Drift
from outbox.reconciliation import ReconciliationResult
from outbox.status import BackendSyncStatus, Checked, Failure, lag_text

__all__ = ["console", "drift_table", "drift_text", "failure_table", "json_text", "status_table"]

# Where no terminal says how wide it is, nothing should be cut.
_WIDE = 200
_BREAKER = {"closed": "green", "half_open": "yellow", "open": "red"}


def console() -> Console:
    """Return a console on standard output: as wide as the terminal, and wide for a pipe or a file."""
    # No markup: ids and errors may hold brackets.
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, markup=False)


def json_text(document: Any) -> str:
    """Return JSON: durations in seconds, instants as ISO 8601."""
    return json.dumps(document, default=_plain, indent=2, ensure_ascii=False)


def status_table(statuses: Sequence[BackendSyncStatus]) -> Table:
    """Return one row per secondary; what makes it unhealthy stands out in red."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("secondary")
    table.add_column("status")
    for name in ("pending", "lag", "failing", "dead"):
        table.add_column(name, justify="right")
    table.add_column("breaker")
    table.add_column("delivered", justify="right")
    table.add_column("proved equal")
    table.add_column("last error")
    for each in statuses:
        late = any(reason.startswith("lag ") for reason in each.reasons)
        table.add_row(
            each.backend_id,
            each.status,
            f"{each.pending:,}",
            Text(lag_text(each.lag), "red" if late else ""),
            Text(f"{each.failing:,}", "yellow" if each.failing else ""),
            Text(f"{each.dead:,}", "red" if each.dead else ""),
            Text(each.breaker, _BREAKER.get(each.breaker, "")),
            f"{each.total_synced:,}",
            _proved(each.checked),
            _last_error(each),
        )
    return table


def failure_table(failures: Sequence[Failure]) -> Table:
    """Return one row per failing or dead key."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("secondary", "tenant", "resource", "state"):
        table.add_column(name, overflow="fold")
    table.add_column("attempts", justify="right")
    for name in ("error", "since", "next attempt"):
        table.add_column(name, overflow="fold")
    for each in failures:
        table.add_row(
            each.backend_id,
            each.tenant_id,
            f"{each.resource_type}/{each.resource_id}",
            Text(each.state, "red" if each.state == "dead" else "yellow"),
            str(each.attempts),
            ": ".join(part for part in (each.error_code, each.error) if part),
            _instant(each.first_failed_at),
            _instant(each.next_attempt_at),
        )
    return table


def drift_table(samples: Sequence[Drift]) -> Table:
    """Return one row per resource that differs."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("drift", "tenant", "resource"):
        table.add_column(name, overflow="fold")
    for each in samples:
        table.add_row(each.kind, each.tenant_id, f"{each.resource_type}/{each.resource_id}")
    return table


def drift_text(*results: ReconciliationResult) -> str:
    """Return what comparisons found, added up, such as `0 missing, 0 extra, 0 stale, 0 altered`."""
    kinds = ("missing", "extra", "stale", "altered")
    return ", ".join(f"{sum(getattr(each, kind) for each in results):,} {kind}" for kind in kinds)


def _plain(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _proved(checked: Checked | None) -> Text:
    """When all of it was last compared, and what was left: `14:02:11, 4,812,004 resources`."""
    if checked is None:
        return Text("never", "dim")
    found = f"{checked.left:,} differ" if checked.left else f"{checked.resources:,} resources"
    return Text(f"{_instant(checked.at)}, {found}", "red" if checked.left else "green")


def _last_error(status: BackendSyncStatus) -> str:
    if status.last_error_at is None:
        return ""
    return f"{status.last_error_code or 'unknown'}, {_instant(status.last_error_at)}"


def _instant(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M:%S")
