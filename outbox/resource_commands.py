"""Resource commands: ask about one resource, and erase one."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Annotated, Any

import typer
from msgspec.structs import asdict

from outbox import resource_errands
from outbox.forget import Evidence
from outbox.options import App, Config, Dsn, Json, Schema
from outbox.reach import manager_for, manager_of
from outbox.render import console, json_text
from outbox.render_story import evidence_text, story_text
from outbox.story import Story

__all__ = ["forget", "why"]

_Resource = Annotated[str, typer.Argument(metavar="TYPE/ID", help="The resource, such as Patient/123.")]
_Tenant = Annotated[str, typer.Option("--tenant", help="The tenant it belongs to.")]


def why(
    resource: _Resource,
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    tenant: _Tenant = "default",
    json: Json = False,
) -> None:
    """Tell all about one resource: what each side holds, what is owed, every attempt, what it waits for. No content.

    With --dsn alone only the primary can be asked: what the secondaries hold needs --app or --config. Exit status 0
    when every secondary was seen to be in step, 1 when one is not or cannot be asked.
    """
    asked = resource_errands.resource_of(resource, tenant)
    story = asyncio.run(resource_errands.why(manager_for(app, config, dsn, schema), asked))
    if json:
        typer.echo(json_text(_story(story)))
    else:
        console().print(story_text(story))
    if not story.in_step:
        raise typer.Exit(1)


def forget(
    resource: _Resource,
    app: App = None,
    config: Config = None,
    *,
    tenant: _Tenant = "default",
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it travels with the delete.")] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", min=0, max=86_400, metavar="SECONDS", help="How long to wait for deliveries.")
    ] = 30,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what there is to erase.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Erase one resource: delete it at every secondary, scrub its events and failures, verify that it is gone.

    The primary's row is yours to delete, before. Exit status 0 when everything was seen to be gone (or with --dry-run),
    1 when something is not proved, 2 when it was refused.
    """
    asked = resource_errands.resource_of(resource, tenant)
    if not (yes or dry_run):
        typer.confirm(f"Erase {resource} of tenant {tenant} everywhere, for good?", abort=True, err=True)
    erasing = resource_errands.forget(
        manager_of(app, config), asked, reason, timedelta(seconds=timeout), dry_run=dry_run
    )
    evidence = asyncio.run(erasing)
    if json:
        typer.echo(json_text(_evidence(evidence)))
    else:
        console().print(evidence_text(evidence))
    if not (evidence.complete or dry_run):
        raise typer.Exit(1)


def _story(story: Story) -> dict[str, Any]:
    secondaries = [{**asdict(each), "in_step": each.in_step} for each in story.secondaries]
    return {"in_step": story.in_step, **asdict(story), "secondaries": secondaries}


def _evidence(evidence: Evidence) -> dict[str, Any]:
    return {"complete": evidence.complete, **asdict(evidence)}
