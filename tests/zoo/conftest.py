"""Says at the end which mutants were let out, what lets the same ones out again, and who caught them."""

from __future__ import annotations

import pytest

from tests.zoo.mutants import chosen

CAUGHT = "zoo"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table: mutant, guarantee, caught by, seconds."""
    reports = [report for key in ("passed", "failed") for report in terminalreporter.stats.get(key, [])]
    # Properties, since they come also from the other processes that tests are spread over.
    rows = [row for report in reports for name, row in report.user_properties if name == CAUGHT]
    if not rows:
        return
    terminalreporter.section("bug zoo")
    terminalreporter.write_line(str(chosen()))
    width = max(len(row[0]) for row in rows)
    for name, guarantee, caught_by, seconds in sorted(rows, key=lambda row: (row[1], row[0])):
        terminalreporter.write_line(f"{name:{width}}  {guarantee:2}  {seconds:5.1f} s  {caught_by}")
