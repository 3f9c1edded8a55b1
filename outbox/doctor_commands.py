"""Doctor commands: look at everything that is known to go wrong, and move positions past what secondaries hold."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import typer
from msgspec.structs import asdict
from rich import box
from rich.table import Table
from rich.text import Text

from outbox.ahead import Moved
from outbox.finding import Finding, Verdict
from outbox.manager import SyncManager
from outbox.options import App, Config, Dsn, Json, Schema
from outbox.reach import manager_for, reached
from outbox.render import console, json_text

__all__ = ["doctor"]

# In the order in which they are worth reading.
_STYLES = {Verdict.WRONG: "red", Verdict.WARNING: "yellow", Verdict.UNKNOWN: "dim", Verdict.OK: "green"}


def doctor(
    app: App = None,
    config: Config = None,
    dsn: Dsn = None,
    schema: Schema = None,
    *,
    repair: Annotated[
        bool,
        typer.Option("--repair/--dry-run", help="Move positions past what any secondary holds, or only tell."),
    ] = False,
    json: Json = False,
) -> None:
    """Look at the primary, the tables and every secondary; say what is wrong and what to do next.

    Exit status 1 when something is wrong. With --dsn alone the secondaries themselves are not asked.
    """
    manager = manager_for(app, config, dsn, schema)
    moved, findings = asyncio.run(_examine(manager, repair=repair))
    wrong = any(each.verdict is Verdict.WRONG for each in findings)
    if json:
        document = {"ok": not wrong, "findings": findings} | ({"moved": asdict(moved)} if moved else {})
        typer.echo(json_text(document))
    else:
        if moved is not None:
            typer.echo(_moved_text(moved))
        console().print(_finding_table(findings))
        typer.echo(_summary(findings))
    if wrong:
        raise typer.Exit(1)


async def _examine(manager: SyncManager, *, repair: bool) -> tuple[Moved | None, list[Finding]]:
    async with reached(manager.engine):
        try:
            moved = await manager.move_past() if repair else None
            return moved, await manager.diagnose()
        finally:
            await manager.aclose()


def _finding_table(findings: Sequence[Finding]) -> Table:
    """Return one row per finding, the worst first."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("looked at", "verdict", "found", "next"):
        table.add_column(name, overflow="fold")
    for each in sorted(findings, key=lambda finding: list(_STYLES).index(finding.verdict)):
        table.add_row(each.name, Text(each.verdict, _STYLES[each.verdict]), each.found, each.advice)
    return table


def _summary(findings: Sequence[Finding]) -> str:
    """Return how many findings there are of each verdict that there is: `1 wrong, 2 unknown, 17 ok`."""
    counted = Counter(each.verdict for each in findings)
    return ", ".join(f"{counted[verdict]} {verdict}" for verdict in _STYLES if counted[verdict])


def _moved_text(moved: Moved) -> str:
    if moved.after == moved.before:
        done = f"positions stay at {moved.after:,}: no secondary that could be asked holds a higher one"
    else:
        done = f"moved positions from {moved.before:,} to {moved.after:,}: the next one is above all that is held"
    if moved.ahead:
        again = "; ".join(f"outbox reconcile {name} --repair" for name in moved.ahead)
        events = f"{moved.again:,} event{'' if moved.again == 1 else 's'}"
        done += f"\nwhat they are owed was recorded again, above all that they hold: {events}"
        done += f"\nwhat else these hold is not known before they are reconciled: {again}"
    if moved.unasked:
        done += f"\nnot asked, because they cannot say or did not answer: {', '.join(moved.unasked)}"
    return done
