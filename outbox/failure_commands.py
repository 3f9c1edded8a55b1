"""Failure commands: list what failed, try it again, give it up."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from outbox import errands
from outbox.operate import Which
from outbox.options import App, Config, Dsn, Json, Schema, refuse_options_before
from outbox.reach import tables_of
from outbox.render import console, failure_table, json_text

__all__ = ["discard", "failures", "list_failures", "list_them", "redrive"]

failures = typer.Typer(help="List the keys that failed; try them again, or give them up.")

_Of = Annotated[str | None, typer.Option("--backend", metavar="NAME", help="Only this secondary's.")]
_Tenant = Annotated[str | None, typer.Option("--tenant", help="Only this tenant's.")]
_Type = Annotated[str | None, typer.Option("--type", help="Only this resource type.")]
_Id = Annotated[str | None, typer.Option("--id", help="Only this resource.")]
_Code = Annotated[str | None, typer.Option("--code", help="Only what failed with this error code.")]
_State = Annotated[str | None, typer.Option("--state", help="Only what is `retrying`, or only what is `dead`.")]
_DryRun = Annotated[bool, typer.Option("--dry-run", help="Only tell how many.")]
_Most = Annotated[int, typer.Option("--most", min=1, help="How many to list.")]


@failures.callback(invoke_without_command=True)
def list_failures(
    context: typer.Context,
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    backend: _Of = None,
    most: _Most = 100,
    json: Json = False,
) -> None:
    """List the keys that failed: dead ones first, then those that will be tried again."""
    if context.invoked_subcommand is None:
        list_them(app, config, dsn, schema, backend=backend, most=most, json=json)
    else:
        refuse_options_before(context)


@failures.command("list")
def list_them(
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    backend: _Of = None,
    most: _Most = 100,
    json: Json = False,
) -> None:
    """List them, as without a command."""
    found = asyncio.run(errands.look_at_failures(tables_of(app, config, dsn, schema), backend, most))
    if json:
        typer.echo(json_text({"failures": found}))
    elif found:
        console().print(failure_table(found))
        if len(found) == most:
            typer.echo(f"These are the first {most:,}; --most shows more.")
    else:
        typer.echo("Nothing fails.")


@failures.command()
def redrive(
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    backend: _Of = None,
    tenant: _Tenant = None,
    resource_type: _Type = None,
    resource_id: _Id = None,
    code: _Code = None,
    state: _State = None,
    dry_run: _DryRun = False,
) -> None:
    """Try failures again at once, with all attempts before them: all of them, or those that match."""
    which = Which(backend, tenant, resource_type, resource_id, code, state)
    keys = asyncio.run(errands.redrive(tables_of(app, config, dsn, schema), which, dry_run=dry_run))
    typer.echo(f"{_keys(keys)} would be tried again" if dry_run else f"{_keys(keys)} due now; a relay carries them")


@failures.command()
def discard(
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept as long as the events are.")],
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    backend: _Of = None,
    tenant: _Tenant = None,
    resource_type: _Type = None,
    resource_id: _Id = None,
    code: _Code = None,
    state: _State = "dead",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: _DryRun = False,
) -> None:
    """Give up what is dead (or, with --state retrying, what still fails), and note why.

    The secondary then differs from the primary in these keys until they are written again; reconcile says so.
    """
    which = Which(backend, tenant, resource_type, resource_id, code, state)

    def given_up(*, only_tell: bool) -> str:
        # Each run closes its connections, and so has tables of its own.
        tables = tables_of(app, config, dsn, schema)
        return _keys(asyncio.run(errands.discard(tables, which, reason, dry_run=only_tell)))

    if dry_run or not yes:
        typer.echo(f"{given_up(only_tell=True)} would be given up")
    if dry_run:
        return
    if not yes:
        typer.confirm("Give up what they are owed?", abort=True)
    typer.echo(f"{given_up(only_tell=False)} given up")


def _keys(keys: int) -> str:
    return "1 key" if keys == 1 else f"{keys:,} keys"
