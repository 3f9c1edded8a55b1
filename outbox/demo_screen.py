"""The demo's screen: a calm picture where there is a terminal, plain lines everywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal, NamedTuple, Protocol

import typer
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from outbox.reconciliation import ReconciliationResult
from outbox.status import BackendSyncStatus, lag_text

__all__ = ["Act", "Screen", "open_screen"]

_BARS = "▁▂▃▄▅▆▇█"
_MOMENTS = 40
_MOMENT = 1.0
_WIDEST = 96
_BEHIND = timedelta(seconds=1)
# Below this much, a lag is drawn as the little it is.
_LEAST_SCALE = 4.0
_STATES = {"steady": "green", "behind": "yellow", "down": "red"}
# What moves is the numbers, not the columns.
_STANDING = {"secondary": 9, "state": 6, ">pending": 7, ">lag": 6, ">failing": 7, "breaker": 9, ">delivered": 9}
_COMPARISON = {"secondary": 9, ">pending": 7, ">compared": 8, ">missing": 7, ">extra": 5, ">stale": 5, ">altered": 7}


class Act(NamedTuple):
    """A title of one word, and the sentence that announces what is going to be seen."""

    title: str
    sentence: str


class Screen(Protocol):
    """Where the demo is shown."""

    def open_act(self, number: int) -> None:
        """Announce an act; numbers start at 0."""

    def close_act(self, result: str) -> None:
        """Say what the act has shown."""

    def say(self, sentence: str) -> None:
        """Say what happens right now."""

    def progress(self, share: float) -> None:
        """Show how much of the act is done, from 0 to 1."""

    def statuses(self, statuses: Mapping[str, BackendSyncStatus]) -> None:
        """Show how the secondaries stand."""

    def reconciled(self, results: Sequence[ReconciliationResult]) -> None:
        """Show what comparisons have found so far."""


@contextmanager
def open_screen(acts: Sequence[Act], *, plain: bool) -> Iterator[Screen]:
    """Yield a picture that moves, or plain lines if asked for or if standard output is no terminal for pictures."""
    console = Console(highlight=False, markup=False)
    if plain or not console.is_terminal or console.is_dumb_terminal or "utf" not in console.encoding:
        yield _Lines(acts)
        return
    picture = _Picture(acts, console)
    with Live(get_renderable=picture.render, console=console, auto_refresh=False, vertical_overflow="crop") as live:
        picture.refresh = live.refresh
        yield picture
        live.refresh()


class _Lines:
    def __init__(self, acts: Sequence[Act]) -> None:
        self._acts = acts
        self._latest: Mapping[str, BackendSyncStatus] = {}

    def open_act(self, number: int) -> None:
        title, sentence = self._acts[number]
        typer.echo(f"[{number + 1}/{len(self._acts)}] {title}: {sentence}")

    def close_act(self, result: str) -> None:
        for each in self._latest.values():
            typer.echo(
                f"      {each.backend_id:<10} {each.pending:>6,} pending   lag {lag_text(each.lag):>6}   "
                f"breaker {each.breaker:<9}   {_delivered(each):>6,} delivered"
            )
        typer.echo(f"      {result}")

    def say(self, sentence: str) -> None:
        typer.echo(f"      {sentence}")

    def progress(self, share: float) -> None:
        """Lines do not move."""

    def statuses(self, statuses: Mapping[str, BackendSyncStatus]) -> None:
        self._latest = statuses

    def reconciled(self, results: Sequence[ReconciliationResult]) -> None:
        """The acts say it in words."""


class _Picture:
    """All that is on the screen; drawn again whenever something is known to have changed, and never by a thread."""

    def __init__(self, acts: Sequence[Act], console: Console) -> None:
        self._acts = acts
        self._console = console
        self._results: list[str] = []
        self._said = ""
        self._share = 0.0
        self._latest: Mapping[str, BackendSyncStatus] = {}
        self._lags: dict[str, deque[float]] = {}
        self._moment = 0
        self._compared: dict[str, ReconciliationResult] = {}
        self._started = time.monotonic()
        # Put in place by whoever opens the screen.
        self.refresh: Callable[[], object] = lambda: None

    def open_act(self, number: int) -> None:
        assert number == len(self._results), "acts follow one another"
        self._said, self._share = "", 0.0
        self.refresh()

    def close_act(self, result: str) -> None:
        self._results.append(result)
        self._said = ""
        self.refresh()

    def say(self, sentence: str) -> None:
        self._said = sentence
        self.refresh()

    def progress(self, share: float) -> None:
        self._share = min(1.0, share)

    def statuses(self, statuses: Mapping[str, BackendSyncStatus]) -> None:
        self._latest = statuses
        moment = int((time.monotonic() - self._started) / _MOMENT)
        for name, each in statuses.items():
            lags = self._lags.setdefault(name, deque([0.0], maxlen=_MOMENTS))
            if moment > self._moment:
                lags.append(0.0)
            lags[-1] = max(lags[-1], each.lag.total_seconds())
        self._moment = moment
        self.refresh()

    def reconciled(self, results: Sequence[ReconciliationResult]) -> None:
        self._compared = {each.backend_id: each for each in results}
        self.refresh()

    def render(self) -> RenderableType:
        """Return the whole picture."""
        # Room for the ^C that a terminal echoes: it must not break the last line and shift the picture.
        width = min(self._console.width - 2, _WIDEST)
        table = self._comparison() if self._compared else self._standing(width)
        return Group(self._heading(width), Text(), self._programme(width), table, *self._footer(width))

    def _heading(self, width: int) -> RenderableType:
        elapsed = int(time.monotonic() - self._started)
        act = min(len(self._results) + 1, len(self._acts))
        heading = Table.grid(expand=False)
        heading.width = width
        heading.add_column()
        heading.add_column(justify="right")
        right = Text(f"act {act} of {len(self._acts)}   {elapsed // 60}:{elapsed % 60:02}", style="dim")
        heading.add_row(Text("outbox demo", style="bold"), right)
        return heading

    def _programme(self, width: int) -> Table:
        programme = Table.grid(padding=(0, 1))
        programme.width = width
        programme.add_column(width=1)
        programme.add_column(width=8)
        programme.add_column(ratio=1)
        for number, (title, sentence) in enumerate(self._acts):
            if number < len(self._results):
                programme.add_row(Text("✓", "green"), title, Text(self._results[number], "dim"))
            elif number == len(self._results):
                programme.add_row(Text("▸", "cyan"), Text(title, "bold"), sentence)
            else:
                programme.add_row("", Text(title, "dim"))
        return programme

    def _standing(self, width: int) -> Table:
        # Two spaces beside each column; what is left is for the past.
        room = max(4, width - sum(_STANDING.values()) - 2 * len(_STANDING) - 2)
        table = _table(_STANDING | {"lag, lately"[:room]: room})
        most = max([_LEAST_SCALE, *(lag for lags in self._lags.values() for lag in list(lags)[-room:])])
        for name, each in self._latest.items():
            state = _state(each)
            table.add_row(
                name,
                Text(state, _STATES[state]),
                Text(f"{each.pending:,}", "bold" if each.pending else "dim"),
                Text(lag_text(each.lag), "bold" if each.lag > _BEHIND else "dim"),
                Text(f"{each.failing + each.dead:,}", "red" if each.failing + each.dead else "dim"),
                Text(each.breaker.replace("_", "-"), "dim" if each.breaker == "closed" else "red"),
                f"{_delivered(each):,}",
                Text(_sparkline(list(self._lags[name])[-room:], most), _STATES[state]),
            )
        return table

    def _comparison(self) -> Table:
        table = _table(_COMPARISON | {">repaired": 8})
        for name, each in self._latest.items():
            found = self._compared.get(name)
            pending = Text(f"{each.pending:,}", "bold" if each.pending else "dim")
            if found is None:
                table.add_row(name, pending, *[Text("…", "dim")] * 6)
                continue
            drift = (found.missing, found.extra, found.stale, found.altered)
            counts = [Text(f"{count:,}", "bold red" if count else "green") for count in drift]
            table.add_row(name, pending, f"{found.primary_count:,}", *counts, f"{found.repaired:,}")
        return table

    def _footer(self, width: int) -> Iterator[RenderableType]:
        if len(self._results) < len(self._acts):
            yield Text(self._said, style="italic")
            yield ProgressBar(total=1.0, completed=self._share, width=width)


def _table(columns: Mapping[str, int]) -> Table:
    """Return an empty table of fixed widths; `>` stands before what is set to the right."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True, header_style="dim")
    for column, width in columns.items():
        justify: Literal["left", "right"] = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=justify, width=width, no_wrap=True)
    return table


def _state(status: BackendSyncStatus) -> str:
    if status.breaker != "closed":
        return "down"
    return "behind" if status.lag > _BEHIND else "steady"


def _sparkline(lags: Sequence[float], most: float) -> str:
    return "".join(_BARS[min(int(lag / most * len(_BARS)), len(_BARS) - 1)] for lag in lags)


def _delivered(status: BackendSyncStatus) -> int:
    return status.applied + status.stale + status.superseded
