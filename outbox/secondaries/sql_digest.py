"""What a SQL secondary says about its resources: digests made here, and sums of fingerprints made in the database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from outbox.content import fingerprint
from outbox.secondaries.base import ResourceDigest, Summary
from outbox.secondaries.reading import digest_of
from outbox.secondaries.sql_table import MYSQL

__all__ = ["digests", "live", "summary", "summing", "within"]

_HEX_DIGITS = 15
# No number of fingerprints outweighs it.
_UNHASHED = -(10**30)


def live(table: sa.Table, tenant_id: str, resource_type: str) -> sa.ColumnElement[bool]:
    """Return the condition of what is there and not deleted."""
    c = table.c
    return sa.and_(c.tenant_id == tenant_id, c.resource_type == resource_type, c.content.is_not(None))


def within(table: sa.Table, after: str | None, through: str | None) -> sa.ColumnElement[bool]:
    """Return the condition of an id in the range; None leaves an end open."""
    name = table.c.resource_id
    ends = [*([] if after is None else [name > after]), *([] if through is None else [name <= through])]
    return sa.and_(sa.true(), *ends)


def digests(rows: Sequence[sa.Row[*tuple[Any, ...]]]) -> list[ResourceDigest]:
    """Return the digests of rows of (resource_id, position, content)."""
    return [ResourceDigest(name, position, digest_of(content)) for name, position, content in rows]


def summary(rows: Sequence[sa.Row[*tuple[Any, ...]]]) -> Summary:
    """Return the summary of rows of (resource_id, position, content)."""
    return Summary(len(rows), sum(fingerprint(name, content) for name, _, content in rows))


def summing(table: sa.Table, database: str) -> sa.Select[int, int]:
    """Return a query for how many rows there are, and the sum of `fingerprint` of each.

    Every value is a text of its own bytes in UTF-8 before it is hashed, whatever the database stores it in. The sum is
    negative when the database could not hash one of them.
    """
    number = _in_mysql(table) if database in MYSQL else _in_postgres(table)
    return sa.select(sa.func.count(), sa.func.sum(number)).select_from(table)


def _in_postgres(table: sa.Table) -> sa.ColumnElement[int]:
    text = table.c.resource_id.concat(sa.func.chr(10)).concat(table.c.content)
    digits = sa.func.substr(sa.func.md5(sa.func.convert_to(text, "UTF8")), 1, _HEX_DIGITS)
    # Of text that begins with x, the cast to bits reads hexadecimal digits.
    bits = sa.cast(sa.literal_column("'x'").concat(digits), postgresql.BIT(4 * _HEX_DIGITS))
    return sa.cast(bits, sa.BigInteger)


def _in_mysql(table: sa.Table) -> sa.ColumnElement[int]:
    content = sa.cast(table.c.content, mysql.CHAR(charset="utf8mb4"))
    # Beside the bytes of an id, the content counts as bytes too.
    text = sa.func.concat(table.c.resource_id, sa.func.char(10), content)
    digits = sa.func.substr(sa.func.md5(text), 1, _HEX_DIGITS)
    number = sa.cast(sa.func.conv(digits, 16, 10), mysql.BIGINT(unsigned=True))
    # Of what is above `max_allowed_packet` it makes null, with a warning; counting it apart would hash all rows twice.
    return sa.func.coalesce(number, sa.cast(_UNHASHED, sa.Numeric(31, 0)))
