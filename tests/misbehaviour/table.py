"""The whole table, and the page that is made of it: `python -m tests.misbehaviour.table` writes it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from tests.misbehaviour.faults import Fault, Section
from tests.misbehaviour.outcomes import Cannot, Outcome
from tests.misbehaviour.search_answers import HTTP
from tests.misbehaviour.sql_answers import SQL
from tests.misbehaviour.store_answers import STORE
from tests.misbehaviour.valkey_answers import VALKEY
from tests.misbehaviour.wire import WIRE

PAGE = Path(__file__).parents[2] / "docs/secondaries.md"
BEGIN, END = "<!-- misbehaviour -->\n", "<!-- /misbehaviour -->\n"
SECTIONS = (WIRE, HTTP, SQL, VALKEY, STORE)
NAMES = {
    "memory": "memory",
    "postgres": "PostgreSQL",
    "mariadb": "MariaDB",
    "sqlite": "SQLite",
    "opensearch": "OpenSearch",
    "elasticsearch": "Elasticsearch",
    "valkey": "Valkey",
    "storage": "a store over TCP",
}


def cells() -> Iterator[tuple[Section, Fault, str, Outcome]]:
    """Every fault on every adapter, also where it cannot arise."""
    for section in SECTIONS:
        for fault, given in section.rows:
            for adapter in NAMES:
                yield section, fault, adapter, section.cell(given, adapter)


def tables() -> str:
    """The page's tables."""
    every = list(cells())
    not_there = sum(isinstance(outcome, Cannot) for *_, outcome in every)
    total = f"{len(every)} cells: {len(every) - not_there} are tested, {not_there} cannot arise, for the reasons given."
    return "\n\n".join([*(f"### {section.title}\n\n{_table(section)}" for section in SECTIONS), total]) + "\n"


def _table(section: Section) -> str:
    columns = [name for name in NAMES if name not in section.elsewhere]
    alike = [list(group) for _, group in groupby(columns, lambda name: [str(row.get(name)) for _, row in section.rows])]
    head = " | ".join(["fault", *(", ".join(NAMES[name] for name in group) for group in alike)])
    lines = [f"| {head} |", "| --- " * (1 + len(alike)) + "|"]
    for fault, given in section.rows:
        lines.append(" | ".join([f"| {fault.name}", *(_words(given[group[0]]) for group in alike)]) + " |")
    return "\n".join(lines) + "\n\n" + _elsewhere(section)


def _words(outcome: Outcome) -> str:
    return f"cannot: {outcome.why}" if isinstance(outcome, Cannot) else str(outcome)


def _elsewhere(section: Section) -> str:
    reasons: dict[str, list[str]] = {}
    for adapter, why in section.elsewhere.items():
        reasons.setdefault(why, []).append(NAMES[adapter])
    return "Cannot arise: " + "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items()) + "."


def written(page: str) -> str:
    """The page with the tables as they are now."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + tables() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
