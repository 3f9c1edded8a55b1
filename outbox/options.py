"""Options: what several commands of the command line take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["App", "Backend", "Config", "Dsn", "Json", "Schema"]

App = Annotated[
    str | None,
    typer.Option("--app", envvar="OUTBOX_APP", metavar="MODULE:ATTRIBUTE", help="Your SyncManager, found from here."),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", envvar="OUTBOX_CONFIG", metavar="FILE", help="A TOML file that describes the manager."),
]
Dsn = Annotated[
    str | None,
    typer.Option("--dsn", envvar="OUTBOX_DSN", metavar="URL", help="The primary: postgresql://user@host/database."),
]
Schema = Annotated[
    str | None, typer.Option("--schema", metavar="NAME", help="The schema of the outbox tables.  [default: public]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Backend = Annotated[str, typer.Argument(metavar="BACKEND", help="The name of a secondary.")]
