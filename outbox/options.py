"""Options: what several commands of the command line take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["App", "Backend", "Config", "Dsn", "Json", "Schema", "refuse_options_before"]

# The environment is asked in `reach`, where nothing of all this was typed: it must not win over what was.
App = Annotated[
    str | None,
    typer.Option("--app", metavar="MODULE:ATTRIBUTE", help="Your SyncManager, found from here.  [env: OUTBOX_APP]"),
]
Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="A TOML file that describes the manager.  [env: OUTBOX_CONFIG]"),
]
Dsn = Annotated[
    str | None,
    typer.Option("--dsn", metavar="URL", help="The primary: postgresql://user@host/database.  [env: OUTBOX_DSN]"),
]
Schema = Annotated[
    str | None, typer.Option("--schema", metavar="NAME", help="The schema of the outbox tables.  [default: public]")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Backend = Annotated[str, typer.Argument(metavar="BACKEND", help="The name of a secondary.")]


def refuse_options_before(context: typer.Context) -> None:
    """Refuse what was typed before a command's own command, which would not see it: it may say what not to touch."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(f"--{name} belongs after `{context.invoked_subcommand}`; nothing was done")
