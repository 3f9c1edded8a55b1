"""Backfill command: fill a secondary with what the primary holds, and show how far it is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from msgspec.structs import asdict
from rich.progress import BarColumn, Progress, TextColumn

from outbox import errands
from outbox.backfill import SHARE, BackfillProgress
from outbox.interrupt import until_signal
from outbox.options import App, Backend, Config, Json
from outbox.reach import manager_of
from outbox.render import console, json_text
from outbox.status import lag_text

__all__ = ["backfill"]


def backfill(
    backend: Backend,
    app: App = None,
    config: Config = None,
    tenant: Annotated[str | None, typer.Option("--tenant", help="Only this tenant.")] = None,
    resource_type: Annotated[str | None, typer.Option("--type", help="Only this resource type.")] = None,
    *,
    rate: Annotated[
        float | None,
        typer.Option("--rate", min=0.1, help="Most resources per second.  [default: as fast as it is carried]"),
    ] = None,
    share: Annotated[
        float, typer.Option("--share", min=0.01, max=1, help="How much of the time it works; the rest is for others.")
    ] = SHARE,
    restart: Annotated[bool, typer.Option("--restart", help="Record again what was recorded.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell how many.")] = False,
    json: Json = False,
) -> None:
    """Record an event for every resource that the primary holds, owed to one secondary, while writes go on.

    A relay must be running: what it has not carried yet holds up the rest. Ctrl-C stops it, and told again it goes on
    where it was. Exit status 1 when some rows cannot be delivered exactly, 130 when stopped.
    """
    manager = manager_of(app, config)
    if dry_run:
        found = asyncio.run(errands.backfill(manager, backend, tenant, resource_type, restart=restart, dry_run=True))
        typer.echo(json_text(_plain(found)) if json else f"{found.left:,} of {found.total:,} resources to record")
        return

    async def filled() -> int:
        with _shown(backend, quiet=json) as told:
            found = await errands.backfill(
                manager, backend, tenant, resource_type, rate=rate, share=share, restart=restart, progress=told
            )
        typer.echo(json_text(_plain(found)) if json else _said(found))
        return int(found.refused > 0)

    if code := until_signal(filled()):
        if code > 1:
            typer.echo(f"stopped; outbox backfill {backend} goes on where it was", err=True)
        raise typer.Exit(code)


@contextmanager
def _shown(backend: str, *, quiet: bool) -> Iterator[Callable[[BackfillProgress], None]]:
    """Yield what draws the progress."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[recorded]:,} of {task.total:,.0f}  {task.fields[pace]}"),
    )
    with Progress(*columns, console=console(), disable=quiet) as progress:
        bar = progress.add_task(backend, total=0, recorded=0, pace="")

        def told(found: BackfillProgress) -> None:
            progress.update(
                bar,
                total=found.total,
                completed=found.recorded + found.refused,
                recorded=found.recorded,
                pace=_pace(found),
            )

        yield told


def _pace(found: BackfillProgress) -> str:
    if found.waiting:
        return f"waits for {found.waiting}"
    left = "" if found.finished or found.time_left is None else f", {lag_text(found.time_left)} left"
    return f"{found.per_second:,.0f} per second{left}"


def _said(found: BackfillProgress) -> str:
    refused = "".join(f"\n{each.resource_type} {each.key}: {each.problem}" for each in found.refusals)
    more = f"; {found.refused:,} cannot be delivered exactly{refused}" if found.refused else ""
    return f"recorded {found.recorded:,} resources for {found.backend_id}; a relay carries them{more}"


def _plain(found: BackfillProgress) -> dict[str, object]:
    return {**asdict(found), "left": found.left}
