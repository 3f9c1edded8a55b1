"""Checker: a pure function from the history of a run to a report, and the command that prints one.

`python -m outbox.testing.checker FILE` exits with 1 when something is invalid, and with 2 when FILE is no history.
Nothing is sampled: every event of the history is looked at by every check, in one pass, and only when something is
wrong in a second one that looks for the records that show it.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from outbox.testing.checks.delivery import lost, waited_early, wrongly_pruned
from outbox.testing.checks.effects import altered, cross_tenant, phantom, regressed, resurrected
from outbox.testing.checks.ending import converged, equal, vacuous
from outbox.testing.checks.leases import commit_order, double_leased, stale_settled
from outbox.testing.checks.tables import attempts_bound, counts_add_up, false_drift
from outbox.testing.checks.verdict import Anomaly, Answer, Check, Verdict
from outbox.testing.evidence import Shown, evidence
from outbox.testing.fold import fold
from outbox.testing.history import BrokenHistory, Recording
from outbox.testing.records import Record

__all__ = ["CHECKS", "Report", "check", "main"]

#: Every check, in the order of a report.
CHECKS: tuple[Check, ...] = (
    *(lost, phantom, altered, cross_tenant, regressed, resurrected),
    *(double_leased, commit_order, stale_settled, waited_early, wrongly_pruned),
    *(counts_add_up, attempts_bound, false_drift, equal, converged, vacuous),
)


class Report(msgspec.Struct, frozen=True):
    """What all checks say of a history, and for each anomaly shown the few records that show it."""

    records: int
    verdicts: tuple[Verdict, ...]
    shown: tuple[Shown, ...] = ()

    @property
    def answer(self) -> Answer:
        """The worst of all: invalid when one is, else unknown when one is."""
        answers = {verdict.answer for verdict in self.verdicts}
        return next((each for each in (Answer.INVALID, Answer.UNKNOWN) if each in answers), Answer.VALID)

    def __getitem__(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.check == name)

    def lines(self) -> Iterable[str]:
        """Yield the report for people, line by line."""
        yield f"{self.answer}: {self.records:,} records"
        for verdict in self.verdicts:
            yield from _lines(verdict)
            for anomaly in verdict.anomalies:
                yield f"    {_described(anomaly)}"
                yield from (f"      {line}" for each in self.shown if each.anomaly is anomaly for line in each.lines())


def check(history: Iterable[Record]) -> Report:
    """Return what every check says of a history, which is read once, and once more when something is wrong."""
    facts = fold(history)
    verdicts = tuple(each(facts) for each in CHECKS)
    anomalies = [anomaly for verdict in verdicts for anomaly in verdict.anomalies]
    return Report(facts.records, verdicts, evidence(history, anomalies) if anomalies else ())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report of a file; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m outbox.testing.checker", description="Judge the history of a run.")
    parser.add_argument("file", type=Path)
    # Nothing here is in a circle, and millions of objects would be gone through for nothing.
    gc.disable()
    history = Recording(parser.parse_args(arguments).file)
    try:
        report = check(history)
    except (BrokenHistory, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    finally:
        gc.enable()
    sys.stdout.writelines(f"{line}\n" for line in report.lines())
    if history.torn:
        sys.stdout.write(f"{history.torn} torn lines, each the last of its process\n")
    return int(report.answer is Answer.INVALID)


def _lines(verdict: Verdict) -> Iterable[str]:
    counts = ", ".join(f"{number:,} {name}" for name, number in verdict.counts.items() if number)
    yield f"  {verdict.answer:<8} {verdict.check:<15} {counts}"
    yield from (f"    not told: {each}" for each in verdict.missing)


def _described(anomaly: Anomaly) -> str:
    where = [anomaly.backend_id, "/".join(anomaly.key or ()), " ".join(map(str, anomaly.positions))]
    return ", ".join([anomaly.text, *(each for each in where if each)])


if __name__ == "__main__":
    sys.exit(main())
