"""Promises 7, 8 and 9 on every adapter: a table of faults, and what must become of a batch under each."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.misbehaviour.faults import Fault, Section
from tests.misbehaviour.outcomes import Cannot, Outcome
from tests.misbehaviour.stands import SERVERS, STANDS, Terms
from tests.misbehaviour.table import NAMES, PAGE, SECTIONS, cells, written
from tests.misbehaviour.tour import Tour, nothing_left_open
from tests.misbehaviour.wire import resolved

Rows = list[tuple[Fault, Outcome]]
# A tour is short enough for a slow machine.
ROWS_AT_ONCE = 7


def tours() -> Iterator[Any]:
    """One for each adapter and section, in pieces of faults that want the same adapter."""
    for section in SECTIONS:
        for adapter in NAMES:
            rows = [(fault, section.cell(given, adapter)) for fault, given in section.rows]
            rows = [(fault, outcome) for fault, outcome in rows if not isinstance(outcome, Cannot)]
            for (timeout, named), alike in groupby(sorted(rows, key=_wants), key=_wants):
                rest = list(alike)
                for start in range(0, len(rest), ROWS_AT_ONCE):
                    name = f"{section.title}-{adapter}-{timeout}-{named}-{start}".replace(" ", "_")
                    yield pytest.param(section, adapter, rest[start : start + ROWS_AT_ONCE], id=name)


def _wants(row: tuple[Fault, Outcome]) -> tuple[float, bool]:
    return row[0].timeout, row[0].named


@pytest.mark.parametrize(("section", "adapter", "rows"), list(tours()))
async def test_misbehaviour(
    primary: AsyncEngine, request: pytest.FixtureRequest, tmp_path: Path, section: Section, adapter: str, rows: Rows
) -> None:
    """Each fault is recorded as the table says, costs others nothing, and when it ends all is equal and let go."""
    fault, _ = rows[0]
    terms = Terms(request, tmp_path, timedelta(seconds=fault.timeout), section.front, fault.named)
    if adapter in SERVERS:
        terms.of_server(SERVERS[adapter])
    with patch("socket.getaddrinfo", resolved):
        async with nothing_left_open(primary), STANDS[adapter](terms) as stand:
            await Tour(primary, stand).take(rows)


def test_every_cell_is_tested_or_says_why_not() -> None:
    every = list(cells())
    assert len(every) == sum(len(section.rows) for section in SECTIONS) * len(NAMES)
    assert all(outcome.why for *_, outcome in every if isinstance(outcome, Cannot))
    assert sum(len(param.values[2]) for param in tours()) == sum(not isinstance(each[-1], Cannot) for each in every)
    names = [(section.title, fault.name) for section in SECTIONS for fault, _ in section.rows]
    assert len(set(names)) == len(names)


def test_the_page_is_what_the_table_says() -> None:
    assert PAGE.read_text() == written(PAGE.read_text()), "python -m tests.misbehaviour.table"
