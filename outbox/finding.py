"""Finding: what a check of the doctor found, and what every check is given."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.register import Registration
from outbox.settings import SyncConfig
from outbox.statement import Statement

__all__ = ["Case", "Check", "Finding", "Verdict", "found_ok", "found_unknown", "found_warning", "found_wrong"]


class Verdict(StrEnum):
    """How bad it is."""

    OK = "ok"
    """As it should be."""
    WARNING = "warning"
    """It works; somebody should know."""
    WRONG = "wrong"
    """Something does not work, or is not safe."""
    UNKNOWN = "unknown"
    """It could not be asked, or this role may not see it."""


class Finding(msgspec.Struct, frozen=True):
    """One thing that was looked at: its name, the verdict, what was found as a sentence, and what to do next."""

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


class Case(NamedTuple):
    """What every check is given: the primary, the settings, and the secondaries of the manager, if it has any."""

    engine: AsyncEngine
    config: SyncConfig
    registrations: Sequence[Registration]

    async def rows(self, statement: Statement, **parameters: Any) -> Sequence[Any]:
        """Return what a statement answers."""
        async with self.engine.connect() as connection:
            return (await connection.execute(text(statement.on(self.config.database_schema)), parameters)).all()

    async def row(self, statement: Statement, **parameters: Any) -> Any:
        """Return the one row of a statement that always has one."""
        (row,) = await self.rows(statement, **parameters)
        return row


Check = Callable[[Case], Awaitable[Sequence[Finding]]]
"""Looks at one thing, with one statement; what it raises about the primary makes its finding unknown."""


def found_ok(name: str, found: str) -> list[Finding]:
    """Return that all is well."""
    return [Finding(name, Verdict.OK, found)]


def found_warning(name: str, found: str, advice: str) -> list[Finding]:
    """Return something that somebody should know."""
    return [Finding(name, Verdict.WARNING, found, advice)]


def found_wrong(name: str, found: str, advice: str) -> list[Finding]:
    """Return something that does not work, or is not safe."""
    return [Finding(name, Verdict.WRONG, found, advice)]


def found_unknown(name: str, found: str, advice: str = "") -> list[Finding]:
    """Return that it is not known."""
    return [Finding(name, Verdict.UNKNOWN, found, advice)]
