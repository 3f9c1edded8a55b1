"""Statement: SQL as it is read, rendered once for each schema and driver.

Statements are SQL text with named parameters (`:backend_id`) and tables qualified by `{schema}`. The schema's name is
the only thing ever put into a statement, it must match `[a-z_][a-z0-9_]*` and is quoted. States stand as literals: a
state in a parameter hides the partial indexes from a generic plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

from sqlalchemy import text
from sqlalchemy.engine import Dialect
from sqlalchemy.engine.url import URL
from sqlalchemy.sql.compiler import SQLCompiler

from outbox.errors import SettingsError

__all__ = ["Statement", "check_identifier", "dialect_of"]

_IDENTIFIER = re.compile("[a-z_][a-z0-9_]{0,62}")


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement, as it is read; its drivers' forms are derived."""

    sql: str

    def on(self, schema: str) -> str:
        """Return the statement for one schema, still with named parameters."""
        return _qualified(self.sql, schema)

    def asyncpg(self, schema: str) -> tuple[str, tuple[str, ...]]:
        """Return the statement with `$n` parameters, and the parameters' names in that order."""
        said = _said(self.sql, schema, "asyncpg")
        return said.sql, said.names

    def arguments(self, schema: str, parameters: dict[str, Any]) -> tuple[Any, ...]:
        """Return the statement and its arguments as asyncpg's methods take them."""
        said = _said(self.sql, schema, "asyncpg")
        return (said.sql, *said.taken(parameters))

    def call(self, schema: str, driver: str, parameters: dict[str, Any]) -> tuple[str, Any]:
        """Return the statement and its parameters as any driver takes them that SQLAlchemy knows by this name."""
        said = _said(self.sql, schema, driver)
        return said.sql, said.taken(parameters) if said.names else parameters


class _Said(NamedTuple):
    """A statement in a driver's words: with names, what it takes has their order; without, it takes a mapping."""

    sql: str
    names: tuple[str, ...]
    taken: Callable[[dict[str, Any]], tuple[Any, ...]]


@cache
def _qualified(sql: str, schema: str) -> str:
    check_identifier(schema)
    return sql.replace("{schema}", f'"{schema}"')


@cache
def _said(sql: str, schema: str, driver: str) -> _Said:
    compiled = text(_qualified(sql, schema)).compile(dialect=dialect_of(driver))
    assert isinstance(compiled, SQLCompiler)
    names = tuple(compiled.positiontup or ())
    return _Said(str(compiled), names, _picker(names))


def _picker(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    # An `itemgetter` of one name gives no tuple; of several it is the fastest way there is.
    return itemgetter(*names) if len(names) > 1 else lambda parameters: tuple(parameters[name] for name in names)


def check_identifier(schema: str) -> None:
    """Raise `SettingsError` unless a schema's name needs no quoting: it is the only name ever put into a statement."""
    if not _IDENTIFIER.fullmatch(schema):
        raise SettingsError("database_schema", "must match [a-z_][a-z0-9_]{0,62}")


def dialect_of(driver: str) -> Dialect:
    """Return SQLAlchemy's PostgreSQL dialect for a driver, which knows its way of naming parameters."""
    return URL.create(f"postgresql+{driver}").get_dialect()()
