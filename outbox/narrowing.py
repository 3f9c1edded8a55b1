"""Narrowing: the conditions that find a tenant's rows, or some resources, along an index.

A key is text, as `str` makes it of what a column holds, 'None' for a null. Where nobody can tell from the text what the
column holds, a statement is not narrowed, and the objects that it finds tell whose they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any
from urllib.parse import unquote
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Enum,
    Integer,
    Select,
    SmallInteger,
    String,
    Uuid,
    false,
    inspect,
    or_,
    tuple_,
)
from sqlalchemy.orm import QueryableAttribute
from sqlalchemy.types import TypeEngine

from outbox.capture import Tracked, identity_of

__all__ = ["holding", "identified", "of_tenant", "tells_tenants"]

# Turns the text of a key back into the column's value, and into None what is no such text.
_Reader = Callable[[str], Any]


def of_tenant(
    statement: Select[Any], tracked: Tracked, tenant_id: str, values: Collection[Any] | None = None
) -> Select[Any]:
    """Narrow a statement to a tenant, as far as a constant or its text tells which rows those are.

    `values` is what its column holds of it, from whoever has looked.
    """
    column = tracked.tenant_column
    if isinstance(column, str):
        return statement if column == tenant_id else statement.where(false())
    if column is None:
        return statement
    condition = _saying(column, [tenant_id]) if values is None else holding(column, values)
    return statement if condition is None else statement.where(condition)


def tells_tenants(tracked: Tracked) -> bool:
    """Whether the text of a tenant is enough to narrow a statement to exactly its rows."""
    column = tracked.tenant_column
    return isinstance(column, str) or (column is not None and _reader(column.type) is not None)


def identified(tracked: Tracked, resource_ids: Sequence[str]) -> ColumnElement[bool] | None:
    """Return the condition that finds resources by id along an index; None where only the objects can tell."""
    column = tracked.resource_id_column
    if column is not None:
        return _saying(column, resource_ids)
    if tracked.resource_id is not identity_of:
        return None
    columns = inspect(tracked.entity).primary_key
    readers = [_reader(column.type) for column in columns]
    if None in readers:
        return None
    keys = [_parts(name, readers) for name in resource_ids]
    return tuple_(*columns).in_([key for key in keys if key is not None])


def holding(column: QueryableAttribute[Any], values: Collection[Any]) -> ColumnElement[bool]:
    """Return the condition that a column holds one of some values, of which a null may be one, along its index."""
    held = column.in_([value for value in values if value is not None])
    return or_(held, column.is_(None)) if None in values else held


def _saying(column: QueryableAttribute[Any], names: Sequence[str]) -> ColumnElement[bool] | None:
    """Return the condition that a column says one of some texts; None where only the objects can tell."""
    read = _reader(column.type)
    if read is None:
        return None
    values = [value for name in names if (value := read(name)) is not None]
    return holding(column, [*values, None] if str(None) in names else values)


def _reader(kind: TypeEngine[Any]) -> _Reader | None:
    if isinstance(kind, Integer):
        bits = 63 if isinstance(kind, BigInteger) else 15 if isinstance(kind, SmallInteger) else 31
        return lambda name: _number(name, bits)
    if isinstance(kind, Uuid):
        return _uuid if kind.as_uuid else lambda name: _uuid(name) and name
    if isinstance(kind, Enum):
        return {str(value): value for value in kind.enum_class or kind.enums}.get
    return str if isinstance(kind, String) else None


def _number(name: str, bits: int) -> int | None:
    if not name.removeprefix("-").isascii() or not name.removeprefix("-").isdecimal() or len(name) > 20:
        return None
    number = int(name)
    return number if str(number) == name and -(2**bits) <= number < 2**bits else None


def _uuid(name: str) -> UUID | None:
    try:
        found = UUID(name)
    except ValueError:
        return None
    return found if str(found) == name else None


def _parts(name: str, readers: Sequence[_Reader | None]) -> tuple[Any, ...] | None:
    parts = [unquote(part) for part in name.split("/")]
    if len(parts) != len(readers):
        return None
    values = tuple(read(part) for read, part in zip(readers, parts, strict=True) if read is not None)
    return None if None in values else values
