"""Reconcile command: compare a secondary with the primary, show what differs, repair it if told to."""

from __future__ import annotations

import asyncio
import getpass
from datetime import timedelta
from typing import Annotated

import typer

from outbox import errands
from outbox.options import App, Backend, Config, Json
from outbox.reach import manager_of
from outbox.reconciliation import ReconciliationResult, Terms
from outbox.render import console, drift_table, drift_text, json_text
from outbox.status import lag_text

__all__ = ["reconcile"]

_WHY = {
    "owed": "are under way",
    "moved": "changed or arrived meanwhile",
    "failing": "wait for their next attempt",
    "dead": "are dead (outbox failures)",
}


def reconcile(
    backend: Backend,
    app: App = None,
    config: Config = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    resource_type: Annotated[str | None, typer.Option("--type", help="Only this resource type.")] = None,
    *,
    repair: Annotated[
        bool, typer.Option("--repair/--dry-run", help="Record events that restore what differs, or only tell.")
    ] = False,
    patience: Annotated[
        float, typer.Option("--patience", min=0, help="Seconds to wait for what is under way, per tenant and type.")
    ] = 30,
    most_deletes: Annotated[
        float,
        typer.Option("--most-deletes", min=0, max=1, help="Repair deletes extras only up to this share of a type."),
    ] = 0.05,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is written down with the repair.")] = "",
    json: Json = False,
) -> None:
    """Compare a secondary with the primary, and repair it through the outbox if told to.

    Exit status 1 when drift is left: found, and no event recorded that repairs it.
    """
    manager = manager_of(app, config)
    terms = Terms(timedelta(seconds=patience), most_deletes, actor=_whoever(), reason=reason)
    result = asyncio.run(errands.reconcile(manager, backend, tenant, resource_type, terms, repair=repair))
    left = result.missing + result.extra + result.stale + result.altered - result.repaired
    if json:
        typer.echo(json_text(result))
    else:
        _show(result, left)
    if left > 0:
        raise typer.Exit(1)


def _show(result: ReconciliationResult, left: int) -> None:
    if result.samples:
        console().print(drift_table(result.samples))
    typer.echo(f"{result.backend_id}: {drift_text(result)}")
    typer.echo(
        f"compared {result.primary_count:,} resources of the primary with {result.secondary_count:,} of "
        f"{result.backend_id} in {lag_text(result.duration)} ({result.rate:,.0f} per second), the content of "
        f"{result.listed:,} of them read one by one"
    )
    for why, number in sorted(result.in_flight_why.items()):
        typer.echo(f"{number:,} are not counted, as they {_WHY[why]}")
    if result.repaired:
        typer.echo(
            f"recorded {result.repaired:,} events that restore them; a relay carries them to {result.backend_id}"
        )
    if result.refused:
        typer.echo(f"left {result.refused:,} extra alone: too many to be deleted without asking (--most-deletes)")
    if result.uncarried:
        typer.echo(f"left {result.uncarried:,} as they are: no event can carry them exactly; mend them in the primary")
    elif left > 0 and not (result.repaired or result.refused):
        typer.echo("--repair records the events that restore them")


def _whoever() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "command line"
