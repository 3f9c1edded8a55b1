"""`python -m outbox.testing.crash`: run the crash lab, print the report, exit with 1 when something is wrong."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from outbox.testing.binaries import describe_binaries, find_binaries
from outbox.testing.checker import Report
from outbox.testing.checks.verdict import Answer
from outbox.testing.crash.ledger import enter, ran
from outbox.testing.crash.numbers import NOTHING_ASKED, NUMBERS, reached, short, table
from outbox.testing.crash.plan import FAULTS
from outbox.testing.crash.run import run
from outbox.testing.crash.terms import Terms
from outbox.testing.history import Recording

__all__ = ["failed", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as the arguments say; return the exit code."""
    given = _parser().parse_args(arguments)
    faults = tuple(filter(None, given.faults.split(","))) if given.faults is not None else tuple(FAULTS)
    if unknown := set(faults) - set(FAULTS):
        sys.stderr.write(f"unknown faults: {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}\n")
        return 2
    numbers = NUMBERS[given.numbers] if given.numbers else NOTHING_ASKED
    seconds = given.seconds or numbers.seconds
    with tempfile.TemporaryDirectory(prefix="outbox-crash-") as directory:
        history = given.history or Path(tempfile.gettempdir()) / f"outbox-crash-{given.seed}.jsonl"
        history.unlink(missing_ok=True)
        terms = Terms(
            seed=given.seed,
            seconds=seconds,
            relays=given.relays,
            writers=given.writers,
            survivors=given.survivors,
            faults=faults,
            numbers=numbers,
            history_file=str(history.absolute()),
            directory=directory,
        )
        log = history.with_suffix(".log")
        try:
            report, amiss = asyncio.run(run(terms))
        finally:
            if terms.log.exists():
                shutil.copy(terms.log, log)
        found = reached(Recording(history))
        if given.ledger:
            # Of the wheel, of Debian or of a build: which server it was is part of what was shown.
            enter(given.ledger, ran(terms, report, describe_binaries(find_binaries()).split(" from ")[0]))
    sys.stdout.writelines(f"{line}\n" for line in report.lines())
    sys.stdout.writelines(f"{line}\n" for line in (table(terms.asked, found) if terms.asked else ()))
    wrong = failed(report, amiss, short(terms.asked, found))
    sys.stdout.writelines(f"{line}\n" for line in amiss)
    if wrong:
        sys.stdout.write(f"seed {given.seed}, history {history}, what the processes said {log}\n")
    return int(wrong)


def failed(report: Report, amiss: Sequence[str], missing: Sequence[str]) -> bool:
    """Whether a run found something, went otherwise than it should, or showed less than was asked for."""
    return report.answer is Answer.INVALID or bool(amiss or missing)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m outbox.testing.crash", description="Kill, pause, cut; then check.")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000))
    parser.add_argument("--seconds", type=float, help="how long faults go on; 60, or as long as the numbers say")
    parser.add_argument("--numbers", choices=sorted(NUMBERS), help="what must be reached; a shorter run owes its share")
    parser.add_argument("--relays", type=int, default=6)
    parser.add_argument("--writers", type=int, default=2)
    parser.add_argument("--survivors", type=int, default=0, help="relays that nobody kills, to see what they hold")
    parser.add_argument("--history", type=Path, help="where the history is kept")
    parser.add_argument("--ledger", type=Path, help="where what it showed is written down, beside a page made of it")
    parser.add_argument("--faults", help=f"some of {','.join(FAULTS)}; by default all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
