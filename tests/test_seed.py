"""The seed, row by row: every defect is in the table once, held by tests that exist, and the page says what it says.

`python -m tests.test_seed` writes docs/seed.md anew from tests/seed.toml.
"""

from __future__ import annotations

import ast
import os
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
TABLE, PAGE = ROOT / "tests/seed.toml", ROOT / "docs/seed.md"

INTRODUCTION = """\
# What the seed got wrong

This project began from one file, `composite/sync.rs` of a FHIR server: a module that keeps secondary backends in step
from the memory of a process. What was wrong with it, and with the durable outbox that came after it, was written down
before anything was built: {defects} defects, D1 to D71 and U1 to U16, and {checks} checks that a correct system passes.
This page has all of them: what the seed does, what is so here, and the tests that fail if it is not.

{counts}

It is made from [tests/seed.toml](../tests/seed.toml) by `python -m tests.test_seed`; a test sees to it that no row is
missing, that every test it names is there, and that this page is what the table says.
"""


class Section(NamedTuple):
    """A part of the page: its rows are `prefix` and every number of `numbers`."""

    title: str
    prefix: str
    numbers: range

    @property
    def ids(self) -> list[str]:
        return [f"{self.prefix}{number}" for number in self.numbers]


SECTIONS = [
    Section("Durability and atomicity", "D", range(1, 9)),
    Section("Idempotency, order, correctness", "D", range(9, 23)),
    Section("Retry and failure", "D", range(23, 36)),
    Section("Status, health, waiting", "D", range(36, 53)),
    Section("Modes and batches", "D", range(53, 60)),
    Section("Reconciliation", "D", range(60, 67)),
    Section("Security, audit, operation", "D", range(67, 72)),
    Section("The durable outbox that came after", "U", range(1, 17)),
    Section("Checks", "", range(1, 23)),
]
CHECKS = SECTIONS[-1]


class Row(NamedTuple):
    """One defect or check. `tests` hold it, or `reason` says why it cannot arise; `open` says what is not held yet."""

    seed: str
    here: str = ""
    tests: tuple[str, ...] = ()
    reason: str = ""
    open: str = ""


@cache
def table() -> dict[str, Row]:
    """Every row by its id. TOML itself refuses an id that is there twice."""
    found = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    return {name: Row(**row | {"tests": tuple(row.get("tests", ()))}) for name, row in found.items()}


@cache
def functions_of(path: str) -> dict[str, ast.AST]:
    """The test functions of a file, those of its classes included."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), path)
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {node.name: node for node in functions if node.name.startswith("test_")}


def page() -> str:
    """The page as the table has it."""
    parts = [INTRODUCTION.format(defects=len(table()) - len(CHECKS.ids), checks=len(CHECKS.ids), counts=_counts())]
    parts += map(_section, SECTIONS)
    return "\n".join(parts)


def _counts() -> str:
    """How many are held, cannot arise, or are open, and which the latter are."""
    opened = [name for name, row in table().items() if row.open]
    cannot = [name for name, row in table().items() if row.reason and not row.open]
    said = [f"**{len(table()) - len(opened) - len(cannot)}** of {len(table())} are held by tests"]
    said += [f"**{len(cannot)}** cannot arise here ({', '.join(cannot)})"] if cannot else []
    said += (
        [f"**{len(opened)}** are held in part, with what is open said there ({', '.join(opened)})"] if opened else []
    )
    return "; ".join(said) + "."


def _section(section: Section) -> str:
    first = "what is to be seen" if section is CHECKS else "the seed"
    lines = [f"## {section.title}", "", f"| | {first} | here | held by |", "| --- | --- | --- | --- |"]
    return "\n".join([*lines, *(_line(name, table()[name]) for name in section.ids), ""])


def _line(name: str, row: Row) -> str:
    missing = f"**Open:** {row.open}." if row.open else ""
    held = "<br>".join(map(_link, row.tests)) or row.reason
    here = " ".join(filter(None, [row.here, missing]))
    return f"| **{name}** | {_cell(row.seed)} | {_cell(here)} | {held} |"


def _cell(words: str) -> str:
    return words.replace("|", "\\|")


def _link(test: str) -> str:
    """A test by its name as a sentence, leading to its file."""
    path, _, name = test.partition("::")
    words = name.removeprefix("test_").replace("_", " ").replace(" s ", "'s ")
    return f"[{words}]({os.path.relpath(path, 'docs')})"


def write() -> None:
    """Make the page say what the table says."""
    PAGE.write_text(page(), encoding="utf-8")


def test_every_defect_and_every_check_is_there_once() -> None:
    expected = [name for section in SECTIONS for name in section.ids]
    assert list(table()) == expected
    assert len(expected) == 71 + 16 + 22


@pytest.mark.parametrize("name", table())
def test_a_row_says_what_it_is_about_and_how_it_is_held(name: str) -> None:
    row = table()[name]
    assert row.seed
    assert row.here or name in CHECKS.ids
    assert row.tests or row.reason or row.open, "neither held by a test, nor impossible, nor said to be open"
    assert not (row.tests and row.reason), "what cannot arise needs no test"
    assert max(Counter(row.tests).values(), default=1) == 1
    for words in (row.seed, row.here, row.reason):
        assert words == words.strip()
        assert words.endswith(".") or not words, words
    assert not row.open.endswith(".")


@pytest.mark.parametrize("name", table())
def test_every_test_a_row_names_is_there_and_runs(name: str) -> None:
    for test in table()[name].tests:
        path, _, function = test.partition("::")
        assert function in functions_of(path), f"{test} is gone: say in tests/seed.toml what holds {name} now"
        marks = " ".join(map(ast.unparse, getattr(functions_of(path)[function], "decorator_list", ())))
        assert "skip" not in marks
        assert "xfail" not in marks


def test_the_page_says_what_the_table_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `python -m tests.test_seed`, and review what it changes"


if __name__ == "__main__":
    write()
