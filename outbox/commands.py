"""Commands: what `outbox` can be told. They parse and print; what they do is in `errands`."""

from __future__ import annotations

import asyncio
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from msgspec.structs import asdict

from outbox import errands
from outbox.backfill_command import backfill
from outbox.doctor_commands import doctor
from outbox.errors import SettingsError
from outbox.failure_commands import failures
from outbox.health import reasons_in
from outbox.interrupt import until_signal
from outbox.metrics import exposition
from outbox.migrate import migration_sql
from outbox.options import App, Backend, Config, Dsn, Json, Schema
from outbox.reach import manager_of, place_of, tables_of
from outbox.reconcile_command import reconcile
from outbox.render import console, json_text, status_table
from outbox.resource_commands import forget, why
from outbox.roster_commands import add, drain, promote, rebuild, remove
from outbox.settings import SyncConfig

__all__ = ["app", "demo", "metrics", "migrate_tables", "pause", "relay", "resume", "status"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    # Locals in a traceback would show addresses with their passwords.
    pretty_exceptions_enable=False,
    help="Keep secondaries equal to a PostgreSQL primary, and prove it.",
)


@app.command(name="migrate")
def migrate_tables(
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    sql: Annotated[bool, typer.Option("--sql", help="Print the SQL and connect to nothing.")] = False,
) -> None:
    """Bring the outbox tables of a database to what this version needs."""
    if sql:
        typer.echo(migration_sql((SyncConfig(database_schema=schema) if schema else SyncConfig.load()).database_schema))
        return
    # Not the application's: its account need not be one that may create tables.
    tables = tables_of(None, None, dsn or os.environ.get("OUTBOX_DSN"), schema)
    before, after = asyncio.run(errands.migrate_tables(tables))
    done = f"upgraded the outbox tables from {before} to {after}" if before else f"created the outbox tables ({after})"
    done = f"nothing to do, the outbox tables are at {after}" if before == after else done
    typer.echo(f"{place_of(tables.engine)}, schema {tables.schema}: {done}")


@app.command()
def relay(
    app: App = None,
    config: Config = None,
    *,
    drain: Annotated[bool, typer.Option("--drain", help="Carry until nothing is due, then end.")] = False,
) -> None:
    """Carry what is owed to the secondaries until SIGTERM or Ctrl-C; any number may run beside each other."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("outbox").setLevel(logging.INFO)
    manager = manager_of(app, config)
    _exit(until_signal(errands.drain(manager)) if drain else asyncio.run(errands.carry(manager)))


@app.command()
def status(
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    max_lag: Annotated[
        float | None,
        typer.Option(
            "--max-lag",
            min=0,
            metavar="SECONDS",
            help="The oldest that an owed delivery may be.  [default: unhealthy_lag of the settings]",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Show how far behind each secondary is, and what is wrong with it.

    Exit status 0 when all are healthy, 1 with reasons when one is not or none is there, 2 when it could not be asked.
    """
    tables = tables_of(app, config, dsn, schema)
    if max_lag is not None:
        limits = tables.config.model_copy(update={"unhealthy_lag": timedelta(seconds=max_lag)})
        tables = tables._replace(config=limits)
    found = asyncio.run(errands.look_at_status(tables))
    reasons = reasons_in(found, tables.expected)
    if json:
        secondaries = [{**asdict(each), "healthy": each.healthy} for each in found]
        limit = tables.config.unhealthy_lag
        typer.echo(json_text({"ok": not reasons, "max_lag": limit, "reasons": reasons, "secondaries": secondaries}))
    elif found:
        console().print(status_table(found))
        for reason in reasons:
            typer.echo(reason)
    else:
        typer.echo("No secondary is registered yet; a relay registers those of its manager.")
    _exit(int(bool(reasons)))


@app.command()
def metrics(app: App = None, config: Config = None, dsn: Dsn = None, schema: Schema = None) -> None:
    """Print what Prometheus reads: for the textfile collector of its node exporter, or where no page can be served."""
    found = asyncio.run(errands.look_at_status(tables_of(app, config, dsn, schema)))
    typer.echo(exposition(found).decode(), nl=False)


app.add_typer(failures, name="failures")
app.command()(backfill)
app.command()(doctor)
app.command()(reconcile)
app.command()(why)
app.command()(forget)
for command in (add, rebuild, promote, drain, remove):
    app.command()(command)


@app.command()
def pause(backend: Backend, app: App = None, config: Config = None, dsn: Dsn = None, schema: Schema = None) -> None:
    """Carry nothing more to a secondary; what is owed to it is kept, and grows."""
    asyncio.run(errands.pause(tables_of(app, config, dsn, schema), backend))
    typer.echo(f"{backend} is paused; outbox resume {backend} goes on with it")


@app.command()
def resume(backend: Backend, app: App = None, config: Config = None, dsn: Dsn = None, schema: Schema = None) -> None:
    """Carry again to a secondary that was paused."""
    asyncio.run(errands.resume(tables_of(app, config, dsn, schema), backend))
    typer.echo(f"{backend} is live")


@app.command()
def demo(
    *,
    once: Annotated[
        bool, typer.Option("--once", help="Plain lines, as fast as it goes; status 0 only if all is proved equal.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Leave everything running afterwards, until Ctrl-C.")] = False,
    data: Annotated[
        Path | None,
        typer.Option("--data", exists=True, help="FHIR resources of your own: a folder or file of JSON or NDJSON."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Draws other changes and other damage.")] = 1,
) -> None:
    """Watch it work for a minute: real servers, a crash, damage behind its back, and the proof that all is equal."""
    try:
        from outbox.demo import run_demo  # noqa: PLC0415 - needs the clients and servers of an extra
    except ModuleNotFoundError as missing:
        raise SettingsError("demo", f"needs {missing.name}: pip install 'outbox-sync[demo]'") from None
    _exit(run_demo(once=once, keep=keep, data=data, seed=seed))


def _exit(code: int) -> None:
    if code:
        raise typer.Exit(code)
