"""Roster commands: bring a secondary in, fill it anew, and take it out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer
from msgspec.structs import asdict

from outbox import roster_errands as errands
from outbox.interrupt import until_signal
from outbox.options import App, Backend, Config, Dsn, Json, Schema
from outbox.reach import manager_for, manager_of
from outbox.render import console, drift_table, drift_text, json_text
from outbox.retire import Removal
from outbox.roster import Addition

__all__ = ["add", "drain", "promote", "rebuild", "remove"]


def add(backend: Backend, app: App = None, config: Config = None, *, json: Json = False) -> None:
    """Bring a secondary to equal the primary while writes go on, then make it live.

    Told again after it was cut off, it goes on where it was. Exit status 1 when it differs still, and stays a shadow.
    """
    manager = manager_of(app, config)
    _end(lambda: errands.add(manager, backend, _teller(json)), json)


def rebuild(backend: Backend, app: App = None, config: Config = None, *, json: Json = False) -> None:
    """Fill a search index anew beside the one that is searched, and switch to it once it equals the primary.

    Told again after it was cut off, it goes on where it was. Exit status 1 when it differs still: nothing was switched.
    """
    manager = manager_of(app, config)
    _end(lambda: errands.rebuild(manager, backend, _teller(json)), json)


def promote(backend: Backend, app: App = None, config: Config = None, dsn: Dsn = None, schema: Schema = None) -> None:
    """Make a shadow live, as it is: `outbox add` does so by itself, once it has proved that it equals the primary."""
    asyncio.run(errands.promote(manager_for(app, config, dsn, schema), backend))
    typer.echo(f"{backend} is live")


def drain(
    backend: Backend,
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Until it has what it is owed.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Owe a secondary nothing more, before it is removed, and wait until relays have carried what it is owed.

    To carry a backlog and go on, run `outbox relay --drain`. Exit status 1 when some of its keys are dead: those nobody
    carries by himself.
    """
    if not yes:
        typer.echo(f"{backend} will be owed nothing new; only `outbox add {backend}` brings it back.")
        typer.confirm("Go on?", abort=True)
    manager = manager_for(app, config, dsn, schema)

    async def drained() -> int:
        dead = await errands.drain(manager, backend, typer.echo, wait=wait)
        if wait:
            typer.echo(f"{backend} has all it was owed, but {dead:,} dead keys" if dead else f"{backend} has it all")
        return int(dead > 0)

    _exit(until_signal(drained()))


def remove(
    backend: Backend,
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    discard: Annotated[bool, typer.Option("--discard", help="Give up what it is still owed.")] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept as long as the events are.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it is owed.")] = False,
) -> None:
    """Take a secondary out: nothing is owed or carried to it any more, and retention does not wait for it.

    Refuses while it is owed anything; drain it first, or --discard. What it holds is left as it is.
    """

    def told_to(*, only_tell: bool) -> Removal:
        manager = manager_for(app, config, dsn, schema)
        return asyncio.run(errands.remove(manager, backend, reason, discard=discard, dry_run=only_tell))

    if dry_run or (discard and not yes):
        owed = told_to(only_tell=True).given_up
        typer.echo(f"{backend} is owed {owed:,} deliveries")
        if dry_run:
            return
        typer.confirm("Remove it and give them up?", abort=True)
    removed = told_to(only_tell=False)
    typer.echo(f"{backend} is removed; {removed.given_up:,} deliveries were given up")


def _teller(json: bool) -> Callable[[str], None]:
    # Standard output is the document's.
    return lambda sentence: typer.echo(sentence, err=json)


def _end(work: Callable[[], Coroutine[Any, Any, Addition]], json: bool) -> None:
    async def done() -> int:
        added = await work()
        if json:
            typer.echo(json_text({**asdict(added), "equal": added.equal}))
        elif not added.equal:
            _show_differing(added)
        return int(not added.equal)

    _exit(until_signal(done()))


def _show_differing(added: Addition) -> None:
    """Say what differs, where to look, and what to do then."""
    name, proof = added.backend_id, added.proof
    if proof.samples:
        console().print(drift_table(proof.samples))
    typer.echo(f"{name} is {added.status} and differs: {drift_text(proof)}, {added.dead:,} dead keys")
    if added.dead:
        typer.echo(f"why it refused the dead ones: outbox failures --backend {name}")
    if proof.refused:
        typer.echo(f"it holds {proof.refused:,} extra, too many to be deleted unasked: was it empty before?")
    elif proof.uncarried:
        typer.echo(f"{proof.uncarried:,} no event can carry exactly: mend them in the primary")
    elif proof.repaired:
        typer.echo("what it was given did not make it equal: does it drop or change what it says it has applied?")
    if added.status == "live":
        typer.echo(f"it is relied on already; outbox reconcile {name} --repair restores it")
    else:
        typer.echo("nothing was switched and nobody relies on it yet; see to it, and tell it again")


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)
