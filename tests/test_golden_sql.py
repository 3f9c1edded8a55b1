"""Every statement as PostgreSQL gets it, under review: `python -m tests.test_golden_sql` writes the files anew."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import outbox
from outbox.errors import SettingsError
from outbox.migrate import migration_sql
from outbox.settings import SyncConfig
from outbox.statement import Statement

GOLDEN = Path(__file__).parent / "sql"
ANY = Statement("select from {schema}.outbox")
HOSTILE = {
    "quote": 'public"',
    "injection": 'x"; drop table outbox; --',
    "semicolon": "a;b",
    "apostrophe": "a'b",
    "dot": "a.b",
    "dash": "a-b",
    "space": "a b",
    "newline at the end": "public\n",
    "nul": "a\x00b",
    "empty": "",
    "upper case": "Public",
    "digit first": "1a",
    "64 bytes": "a" * 64,
    "long": "a" * 1_000,
    "umlaut": "ä",
    "ligature": "ﬁ",
    "arabic digit": "a\u0661",
    "placeholder": "{schema}",
    "parameter": ":backend_id",
}


def statements() -> dict[str, Statement]:
    """Every `Statement` that a module of the package defines, by `<module>.<name>`."""
    found = {}
    for module in _modules():
        defined = set(_assigned(module))
        for name, value in vars(module).items():
            if isinstance(value, Statement) and name in defined:
                found[f"{module.__name__.removeprefix('outbox.')}.{name}"] = value
    return found


def rendered(statement: Statement) -> str:
    """The text asyncpg sends for schema `public`."""
    return statement.asyncpg("public")[0].strip() + "\n"


def write() -> None:
    """Make the golden files say what the code says."""
    GOLDEN.mkdir(exist_ok=True)
    for file in GOLDEN.glob("*.sql"):
        file.unlink()
    for name, statement in statements().items():
        (GOLDEN / f"{name}.sql").write_text(rendered(statement), encoding="utf-8")


def _modules() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(outbox.__path__, "outbox."):
        if not info.name.endswith("__main__"):
            yield importlib.import_module(info.name)


def _assigned(module: ModuleType) -> Iterator[str]:
    """The names a module assigns at its top, which those it imports are not."""
    for node in ast.parse(inspect.getsource(module)).body:
        for place in getattr(node, "targets", [getattr(node, "target", None)]):
            if isinstance(place, ast.Name):
                yield place.id


def test_every_statement_has_its_golden_file_and_every_file_its_statement() -> None:
    files = {file.name.removesuffix(".sql") for file in GOLDEN.iterdir()}
    assert files == set(statements()), "run `python -m tests.test_golden_sql`, and review what it changes"


@pytest.mark.parametrize("name", sorted(statements()))
def test_statement_is_the_one_under_review(name: str) -> None:
    golden = (GOLDEN / f"{name}.sql").read_text(encoding="utf-8")
    assert rendered(statements()[name]) == golden, "run `python -m tests.test_golden_sql`, and review what it changes"


def test_statements_differ_between_schemas_in_nothing_but_the_schema() -> None:
    for name, statement in statements().items():
        assert rendered(statement).replace('"public"', '"other"') == statement.asyncpg("other")[0].strip() + "\n", name


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_settings_refuse_a_schema_that_is_no_plain_identifier(schema: str) -> None:
    with pytest.raises(SettingsError, match="database_schema"):
        SyncConfig(database_schema=schema)


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_statement_refuses_a_schema_that_is_no_plain_identifier(schema: str) -> None:
    with pytest.raises(SettingsError, match="database_schema"):
        ANY.on(schema)
    with pytest.raises(SettingsError, match="database_schema"):
        ANY.asyncpg(schema)


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_migrations_refuse_a_schema_that_is_no_plain_identifier(schema: str) -> None:
    with pytest.raises(SettingsError, match="database_schema"):
        migration_sql(schema)


@pytest.mark.parametrize("schema", ["public", "_", "a_1", "a" * 63, "select"])
def test_a_plain_identifier_is_taken_by_settings_and_statements(schema: str) -> None:
    assert SyncConfig(database_schema=schema).database_schema == schema
    assert ANY.on(schema) == f'select from "{schema}".outbox'


if __name__ == "__main__":
    write()
