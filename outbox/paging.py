"""Paging: walk a tracked class along its primary key and take its rows, locked, as events.

The order is the database's own order of the primary key, whatever its types and collations: the index is in it, and a
key that was passed stays passed. A key travels as the text that PostgreSQL itself makes of its parts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from sqlalchemy import ColumnElement, Enum, Select, String, Text, cast, func, inspect, literal, select, tuple_
from sqlalchemy.dialects.postgresql import CITEXT
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import QueryableAttribute, Session, lazyload

from outbox.capture import Tracked, Tracking
from outbox.errors import InvalidEvent
from outbox.event import Operation, SyncEvent
from outbox.narrowing import holding

__all__ = ["Extent", "Key", "Taken", "extents"]

Key = tuple[str, ...]

_PAGE = 500


class Taken(msgspec.Struct, frozen=True):
    """A row that was read under its lock. `event` is None when it is none of the scope's, or `problem` says why."""

    key: Key
    event: SyncEvent | None
    problem: InvalidEvent | None = None


@dataclass(frozen=True, slots=True)
class Extent:
    """The rows of one tracked class that belong to one tenant."""

    tracking: Tracking
    tracked: Tracked
    tenant_id: str
    # What the tenant's column holds of it, where there is one: as text, several values may be the same tenant.
    tenant_values: tuple[Any, ...] | None
    total: int

    @property
    def resource_type(self) -> str:
        """What its resources are called."""
        return self.tracked.resource_type

    def keys(self, session: Session, after: Key | None, most: int) -> list[Key]:
        """Return the next keys above `after`, without a lock."""
        statement = self._above(select(*_texts(self.tracked)), after)
        return [tuple(row) for row in session.execute(statement.limit(most))]

    def take(self, session: Session, keys: Sequence[Key]) -> list[Taken]:
        """Lock and return these rows; those that somebody else has locked, or that are gone, are left out."""
        # By name and not by range: what lies between is other tenants'.
        statement = self._rows().where(_key_of(self.tracked).in_([_value(self.tracked, key) for key in keys]))
        return self._taken(session, statement.with_for_update(read=True, skip_locked=True, of=self.tracked.entity))

    def wait_for(self, session: Session, key: Key) -> list[Taken]:
        """Lock and return one row, after whoever has it locked; nothing when it is gone by then."""
        statement = self._rows().where(_key_of(self.tracked) == _value(self.tracked, key))
        return self._taken(session, statement.with_for_update(read=True, of=self.tracked.entity))

    def tenants(self, session: Session, after: Key | None) -> list[tuple[Key, str]]:
        """Return the next page's keys, each with the tenant that its object names."""
        statement = self._above(self._rows(), after).limit(_PAGE)
        return [(tuple(key), self.tracked.tenant(row)) for row, *key in session.execute(statement)]

    def _rows(self) -> Select[Any]:
        # What the mapping would join eagerly cannot be locked; what a content function asks for is loaded then.
        return select(self.tracked.entity, *_texts(self.tracked)).options(lazyload("*"))

    def _above(self, statement: Select[Any], after: Key | None) -> Select[Any]:
        if self.tenant_values is not None:
            column = self.tracked.tenant_column
            assert isinstance(column, QueryableAttribute)
            statement = statement.where(holding(column, self.tenant_values))
        if after is not None:
            statement = statement.where(_key_of(self.tracked) > _value(self.tracked, after))
        return statement.order_by(*_columns(self.tracked))

    def _taken(self, session: Session, statement: Select[Any]) -> list[Taken]:
        return [self._seen(row, tuple(key)) for row, *key in session.execute(statement)]

    def _seen(self, row: Any, key: Key) -> Taken:
        # A subclass that is tracked for itself has rows among its base's, and a scope of its own.
        if self.tracking.of(type(row)) is not self.tracked:
            return Taken(key, None)
        try:
            event = self.tracked.event(Operation.UPDATE, row)
        except InvalidEvent as problem:
            return Taken(key, None, problem)
        return Taken(key, event if event.tenant_id == self.tenant_id else None)


async def extents(engine: AsyncEngine, tracking: Tracking, resource_types: Sequence[str] | None) -> list[Extent]:
    """Return every tenant's extent of the tracked classes, narrowed to some types, with how many rows each has."""
    found: list[Extent] = []
    for tracked in tracking:
        if resource_types is None or tracked.resource_type in resource_types:
            found += await _of_class(engine, tracking, tracked)
    return found


async def _of_class(engine: AsyncEngine, tracking: Tracking, tracked: Tracked) -> list[Extent]:
    column = tracked.tenant_column
    if column is None:
        counted = await _counted_by_reading(engine, tracking, tracked)
        return [Extent(tracking, tracked, tenant, None, rows) for tenant, rows in counted.items()]
    async with AsyncSession(engine) as session:
        if isinstance(column, str):
            rows = await session.scalar(select(func.count()).select_from(tracked.entity))
            return [Extent(tracking, tracked, column, None, rows or 0)]
        statement = select(column, func.count()).select_from(tracked.entity).group_by(column)
        return _by_tenant(tracking, tracked, [(row[0], row[1]) for row in await session.execute(statement)])


def _by_tenant(tracking: Tracking, tracked: Tracked, counted: Iterable[tuple[Any, int]]) -> list[Extent]:
    values: dict[str, list[Any]] = {}
    totals: Counter[str] = Counter()
    for value, rows in counted:
        # As the mapping of a column says it, for a null too.
        values.setdefault(str(value), []).append(value)
        totals[str(value)] += rows
    return [Extent(tracking, tracked, tenant, tuple(found), totals[tenant]) for tenant, found in values.items()]


async def _counted_by_reading(engine: AsyncEngine, tracking: Tracking, tracked: Tracked) -> Counter[str]:
    """Ask every object which tenant it is of, page by page, because nothing but the object knows."""
    counted: Counter[str] = Counter()
    everything = Extent(tracking, tracked, "", None, 0)
    after: Key | None = None
    while True:
        async with AsyncSession(engine) as session:
            page = await session.run_sync(everything.tenants, after)
        counted.update(tenant for _, tenant in page)
        if len(page) < _PAGE:
            return counted
        after = page[-1][0]


def _columns(tracked: Tracked) -> list[QueryableAttribute[Any]]:
    mapper = inspect(tracked.entity)
    return [getattr(tracked.entity, mapper.get_property_by_column(column).key) for column in mapper.primary_key]


def _texts(tracked: Tracked) -> list[Any]:
    return [cast(column, Text).label(f"outbox_key_{number}") for number, column in enumerate(_columns(tracked))]


def _key_of(tracked: Tracked) -> ColumnElement[Any]:
    columns = _columns(tracked)
    return columns[0].expression if len(columns) == 1 else tuple_(*columns)


def _value(tracked: Tracked, key: Key) -> ColumnElement[Any]:
    parts = [_part(column, text) for column, text in zip(_columns(tracked), key, strict=True)]
    return parts[0] if len(parts) == 1 else tuple_(*parts)


def _part(column: QueryableAttribute[Any], text: str) -> ColumnElement[Any]:
    kind = column.type
    # Without the length and collation that a model says: the column's own, in which it is sorted, must decide.
    plain = isinstance(kind, String) and not isinstance(kind, (Enum, CITEXT))
    given = cast(literal(text, Text), Text)
    return given if plain else cast(given, kind)
