"""Ledger: what long runs have shown, one line each, and the page that is made of it."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from outbox.testing.checker import Report
from outbox.testing.checks.verdict import Answer
from outbox.testing.crash.measure import Flat, flat
from outbox.testing.crash.numbers import reached
from outbox.testing.crash.plan import FAULTS
from outbox.testing.crash.terms import Terms
from outbox.testing.history import Recording
from outbox.testing.records import Applied, Asked, Measured

__all__ = ["Found", "Ran", "enter", "ledger", "ran", "write_page"]

_INTRODUCTION = """\
# Reliability

What the crash lab has shown. Made from `reliability.jsonl`; `make soak` adds a run to both, and
`python -m outbox.testing.crash --seed N` with the same other arguments repeats one: the same seed strikes the same
blows, and the operating system does the rest. With `--numbers ci`, or `soak`, it is asked for so many kills, crashes,
cuts and events, goes on until it has them, for twice its time at most, and fails without. Every run ends with a history
that is judged whole, by the same checks: nothing lost, delivered without a commit, altered, moved to another tenant,
taken back, brought back, leased twice, started out of commit order, settled by who had lost it, waited for too early,
or forgotten too soon; counts add up; in the end both sides are equal.

"""

_LIVED = (
    "Nobody kills or stops it; its connections are cut and its primary crashes as everybody's. Medians of the second",
    "and of the last fifth of its life. Converged: from the last fault or write until nothing was owed.\n",
)


class Ran(msgspec.Struct, kw_only=True, tag="ran"):
    """One run."""

    date: str
    commit: str
    server: str
    seed: int
    hours: float
    faults: dict[str, int]
    transactions: int
    events: int
    calls: int
    states: int
    records: int
    anomalies: list[str] = []
    relay_kills: int = 0
    resumed: int = 0
    at_commit: int = 0
    converged: float = 0
    flat: Flat = Flat()


class Found(msgspec.Struct, kw_only=True, tag="found"):
    """Something that a run found, and what became of it."""

    date: str
    seed: int
    what: str
    mended: str = ""


def ran(terms: Terms, report: Report, server: str) -> Ran:
    """Return the entry of a run that is over."""
    seen: Counter[type] = Counter()
    measured: list[Measured] = []
    for record in Recording(terms.history):
        seen[type(record)] += len(record.entries) if isinstance(record, Applied) else 1
        if isinstance(record, Measured):
            measured.append(record)
    found = reached(Recording(terms.history))
    return Ran(
        date=datetime.now(UTC).date().isoformat(),
        commit=_commit(),
        server=server,
        seed=terms.seed,
        hours=round(terms.seconds / 3600, 3),
        faults={fault: found[fault] for fault in sorted(FAULTS) if found[fault]},
        transactions=found["transactions"],
        events=found["events"],
        calls=seen[Asked],
        states=seen[Applied],
        records=report.records,
        anomalies=[verdict.check for verdict in report.verdicts if verdict.answer is Answer.INVALID],
        relay_kills=found["relay kills"],
        resumed=found["zombie resumes"],
        at_commit=found["of them at COMMIT"],
        converged=report["convergence"].counts.get("milliseconds", 0) / 1_000,
        flat=flat(measured),
    )


def ledger(path: Path) -> list[Ran | Found]:
    """Return everything in the ledger."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [msgspec.json.decode(line, type=Ran | Found) for line in lines]


def enter(path: Path, entry: Ran | Found) -> None:
    """Add an entry to the ledger, and make its page anew."""
    with path.open("ab") as lines:
        lines.write(msgspec.json.encode(entry) + b"\n")
    write_page(path)


def write_page(path: Path) -> None:
    """Make the page of a ledger, beside it."""
    path.with_suffix(".md").write_text(_INTRODUCTION + "\n".join(_page(ledger(path))) + "\n")


def _page(entries: list[Ran | Found]) -> Iterator[str]:
    runs = [entry for entry in entries if isinstance(entry, Ran)]
    found = [entry for entry in entries if isinstance(entry, Found)]
    faults = Counter[str]()
    for run in runs:
        faults.update(run.faults)
    yield "## Together\n"
    yield from _table(("what", "how many"), (":--", "--:"), _together(runs, faults))
    yield "\n## Runs\n"
    heads = ("date", "commit", "server", "seed", "hours", "faults", "transactions", "events", "calls", "anomalies")
    aligned = (":--", ":--", ":--", *["--:"] * 6, ":--")
    yield from _table(heads, aligned, ((*_cells(run), ", ".join(run.anomalies) or "none") for run in runs))
    yield "\n## A relay that lives through it\n"
    yield from _LIVED
    names = ("date", "seed", "kills of others", "resumed", "cut at COMMIT", "converged", *Flat.__struct_fields__)
    yield from _table(names, (":--", *["--:"] * 9), (_lived(run) for run in runs if run.flat != Flat()))
    yield "\n## What it found\n"
    for each in found:
        yield f"- {each.date}, seed {each.seed}: {each.what} {each.mended}".rstrip()
    if not found:
        yield "Nothing yet."


def _together(runs: list[Ran], faults: Counter[str]) -> Iterator[tuple[str, ...]]:
    yield "runs", f"{len(runs)}"
    yield "hours", f"{sum(run.hours for run in runs):.2f}"
    for fault, times in sorted(faults.items()):
        yield f"`{fault}`", f"{times:,}"
    yield "transactions", f"{sum(run.transactions for run in runs):,}"
    yield "events", f"{sum(run.events for run in runs):,}"
    yield "calls of secondaries", f"{sum(run.calls for run in runs):,}"
    yield "states applied", f"{sum(run.states for run in runs):,}"
    yield "records judged", f"{sum(run.records for run in runs):,}"
    yield "anomalies", f"{sum(len(run.anomalies) for run in runs)}"


def _cells(run: Ran) -> tuple[str, ...]:
    counts = (sum(run.faults.values()), run.transactions, run.events, run.calls)
    return (run.date, run.commit, run.server, str(run.seed), f"{run.hours:g}", *(f"{count:,}" for count in counts))


def _lived(run: Ran) -> tuple[str, ...]:
    counts = (f"{count:,}" for count in (run.relay_kills, run.resumed, run.at_commit))
    held = (f"{first:g} to {last:g}" for first, last in msgspec.structs.astuple(run.flat))
    return (run.date, str(run.seed), *counts, f"{run.converged:.1f} s", *held)


def _table(heads: Iterable[str], aligned: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join(aligned)} |"
    yield from (f"| {' | '.join(row)} |" for row in rows)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - constant words
    return done.stdout.strip() or "unknown"
