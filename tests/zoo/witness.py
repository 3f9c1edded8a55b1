"""A pytest plugin of the copy that a mutant is in: it sees that it is, and notes how each test ended."""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

import outbox


def pytest_configure(config: pytest.Config) -> None:
    """End at once when another `outbox` than the copy's would be tested."""
    where = Path(outbox.__file__).resolve()
    if not where.is_relative_to(Path.cwd().resolve()):
        pytest.exit(f"the tests would import {where}, which no mutant is in", returncode=9)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    report = yield
    ending = {
        "test": item.nodeid,
        "when": report.when,
        "outcome": report.outcome,
        "errors": [] if call.excinfo is None else [type(each).__name__ for each in _leaves(call.excinfo.value)],
        "said": "" if call.excinfo is None else str(call.excinfo.value)[:300],
        "seconds": round(report.duration, 2),
    }
    with Path(os.environ["OUTBOX_ZOO_ENDINGS"]).open("a") as endings:
        endings.write(json.dumps(ending) + "\n")
    return report


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
