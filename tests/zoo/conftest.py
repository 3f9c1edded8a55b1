"""Says at the start which mutants are let out, and at the end who caught them."""

from __future__ import annotations

import pytest

from tests.zoo.mutants import chosen

Row = tuple[str, int, str, float]
_TABLE = pytest.StashKey[list[Row]]()


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Name the choice, and what brings the same one again."""
    here = any(item.path.name == "test_zoo.py" for item in items)
    return [str(chosen())] if here and not config.option.collectonly else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table: mutant, guarantee, caught by, seconds."""
    if not (table := config.stash.get(_TABLE, [])):
        return
    terminalreporter.section("bug zoo")
    width = max(len(row[0]) for row in table)
    for name, guarantee, caught_by, seconds in sorted(table, key=lambda row: (row[1], row[0])):
        terminalreporter.write_line(f"{name:{width}}  {guarantee:2}  {seconds:5.1f} s  {caught_by}")


@pytest.fixture
def table(pytestconfig: pytest.Config) -> list[Row]:
    """What is printed at the end."""
    return pytestconfig.stash.setdefault(_TABLE, [])
