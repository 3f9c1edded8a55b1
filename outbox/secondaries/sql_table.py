"""The one table of a SQL secondary, and the upsert that never lets it go backwards."""

from __future__ import annotations

import re
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite

from outbox.errors import SettingsError

__all__ = ["KEY", "MYSQL", "SENT", "guarded_upsert", "resources_table"]

MYSQL = ("mariadb", "mysql")
KEY = ("tenant_id", "resource_type", "resource_id")
# The guard compares positions and MySQL assigns in this order, so the position comes last.
_STATE = ("content", "version", "fhir_version", "written_at", "position")
SENT = (*KEY, *_STATE[:3], "position")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")


class _Bytewise(sa.types.TypeDecorator[str]):
    """Text that is compared and sorted by its UTF-8 bytes, trailing spaces included."""

    impl = sa.String
    cache_ok = True

    def load_dialect_impl(self, dialect: sa.Dialect) -> sa.types.TypeEngine[Any]:
        if dialect.name == "postgresql":
            return dialect.type_descriptor(postgresql.TEXT(collation="C"))
        if dialect.name in MYSQL:
            # Its binary collations ignore trailing spaces, or differ in name between the two.
            return dialect.type_descriptor(mysql.VARBINARY(self.length))
        return dialect.type_descriptor(sa.String())

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | bytes | None:
        return value.encode() if value is not None and dialect.name in MYSQL else value

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        return value.decode() if value is not None and dialect.name in MYSQL else value


def resources_table(name: str, schema: str | None) -> sa.Table:
    """Return the table of every resource by its key. Raises `SettingsError` for names that need quoting."""
    for field, value in (("table", name), ("schema", schema or "none")):
        if not _NAME.fullmatch(value):
            raise SettingsError(field, "takes up to 63 ASCII letters, digits and '_', no digit first")
    instant = sa.DateTime(timezone=True).with_variant(mysql.TIMESTAMP(), *MYSQL)
    long_text = mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin")
    # The index of positions costs each write a fifth; without it, how far we are would be a walk through all rows, for
    # which no relay that starts, or met a failed primary, can wait.
    return sa.Table(
        name,
        sa.MetaData(),
        sa.Column("tenant_id", _Bytewise(64), primary_key=True),
        sa.Column("resource_type", _Bytewise(128), primary_key=True),
        sa.Column("resource_id", _Bytewise(512), primary_key=True),
        sa.Column("position", sa.BigInteger, nullable=False, index=True),
        sa.Column("version", _Bytewise(128)),
        sa.Column("fhir_version", _Bytewise(16)),
        sa.Column("content", sa.Text().with_variant(long_text, *MYSQL)),
        sa.Column("written_at", instant, nullable=False, server_default=sa.func.now()),
        schema=schema,
    )


def guarded_upsert(table: sa.Table, database: str) -> sa.Insert:
    """Return the upsert that skips what is not newer; where the database can, it returns the keys of what it wrote."""
    held = table.c
    now = {"written_at": sa.func.current_timestamp()}
    if database in MYSQL:
        mine = mysql.insert(table)
        newer = mine.inserted.position > held.position
        new = {**mine.inserted, **now}
        return mine.on_duplicate_key_update([(name, sa.func.if_(newer, new[name], held[name])) for name in _STATE])
    insert: Any = sqlite.insert if database == "sqlite" else postgresql.insert
    other: postgresql.Insert = insert(table)
    new = {**{name: other.excluded[name] for name in _STATE}, **now}
    newer = other.excluded.position > held.position
    upsert = other.on_conflict_do_update(index_elements=KEY, set_=new, where=newer)
    return upsert.returning(*table.primary_key)
