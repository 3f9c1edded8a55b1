"""Capture: which classes are kept in step, and how a row of them becomes an event."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, TypedDict, cast
from urllib.parse import quote
from uuid import UUID

from sqlalchemy import String, Table, event, inspect
from sqlalchemy.orm import Mapper, QueryableAttribute, Session, object_session

from outbox.before import AsItWas
from outbox.content import DEFAULT_LIMITS, Limits, text_of
from outbox.errors import SettingsError, UntrackedWrite
from outbox.event import Operation, SyncEvent

__all__ = ["Change", "Changes", "Tracked", "Tracking", "changes_of", "columns_of", "identity_of"]


@dataclass(frozen=True, slots=True)
class Change:
    """One row a flush has written. `key_before` is the resource that it was; see `switched` in `Changes`."""

    operation: Operation
    row: Any
    key_before: tuple[str, str] | None = None
    switched: bool = False


@dataclass(frozen=True, slots=True)
class Tracked:
    """How one mapped class becomes events. Every mapping takes the object."""

    entity: type[Any]
    resource_type: str
    tenant: Callable[[Any], str]
    resource_id: Callable[[Any], str]
    # Where a mapping is a column (or, for the tenant, one constant), SQL can filter and order by it, and sum it up if
    # what it holds is the very text that is sent.
    tenant_column: QueryableAttribute[Any] | str | None
    resource_id_column: QueryableAttribute[Any] | None
    content_column: QueryableAttribute[Any] | None
    content: Callable[[Any], Any]
    version: Callable[[Any], str | int | None]
    fhir_version: str | None
    limits: Limits

    def key_of(self, row: Any) -> tuple[str, str]:
        """Return (tenant_id, resource_id)."""
        return (self.tenant(row), self.resource_id(row))

    def events(self, change: Change) -> list[SyncEvent]:
        """Return the event of a change; before it, if the row became another resource, the delete of the one it was.

        A row that was deleted is the resource that it was, whatever it was changed to before.
        """
        event = self.event(change.operation, change.row)
        before = change.key_before
        if before is None or before == (event.tenant_id, event.resource_id):
            return [event]
        gone = SyncEvent.delete(self.resource_type, before[1], tenant_id=before[0], limits=self.limits)
        return [gone] if change.operation is Operation.DELETE else [gone, event]

    def text(self, row: Any) -> str:
        """Return the content that an event of `row` carries, without the checks of one. Raises `InvalidEvent`."""
        return text_of(self.content(row))

    def event(self, operation: Operation, row: Any) -> SyncEvent:
        """Return the event of a change to `row`. Raises `InvalidEvent`."""
        build = {Operation.CREATE: SyncEvent.create, Operation.UPDATE: SyncEvent.update}.get(operation)
        key = (self.resource_type, self.resource_id(row))
        terms = _Terms(
            tenant_id=self.tenant(row), version=self.version(row), fhir_version=self.fhir_version, limits=self.limits
        )
        return SyncEvent.delete(*key, **terms) if build is None else build(*key, self.content(row), **terms)


class _Terms(TypedDict):
    tenant_id: str
    version: str | int | None
    fhir_version: str | None
    limits: Limits


class Tracking:
    """The tracked classes of one manager."""

    def __init__(self) -> None:
        self._tracked: dict[type[Any], Tracked] = {}

    def track(
        self,
        entity: type[Any],
        *,
        resource_type: str | None = None,
        tenant: Callable[[Any], str] | QueryableAttribute[Any] | str = "default",
        resource_id: Callable[[Any], str] | QueryableAttribute[Any] | None = None,
        content: Callable[[Any], Any] | QueryableAttribute[Any] | None = None,
        version: Callable[[Any], str | int | None] | None = None,
        fhir_version: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Keep `entity` and its subclasses in step.

        Raises `SettingsError` when it is not mapped, or when it or its resource type is tracked already.
        """
        mapper = inspect(entity, raiseerr=False)
        if not isinstance(mapper, Mapper):
            raise SettingsError("track", f"{entity!r} is not a mapped class")
        if entity in self._tracked:
            raise SettingsError("track", f"{entity.__name__} is tracked already")
        kind = resource_type or entity.__name__
        if kind in (each.resource_type for each in self):
            raise SettingsError("track", f"{kind} is the resource type of another class")
        self._tracked[entity] = Tracked(
            entity,
            kind,
            (lambda _: tenant) if isinstance(tenant, str) else _function(tenant),
            identity_of if resource_id is None else _function(resource_id),
            tenant if isinstance(tenant, (str, QueryableAttribute)) else None,
            _only_key(mapper) if resource_id is None else _column(resource_id),
            _text_column(content),
            _content(content),
            version or (lambda _: None),
            fhir_version,
            limits,
        )
        self._listen(entity)

    def __iter__(self) -> Iterator[Tracked]:
        """Iterate over what is tracked, in the order of the calls."""
        return iter(self._tracked.values())

    def of(self, entity: type[Any]) -> Tracked | None:
        """Return how a class is tracked, itself or by the nearest of its bases."""
        return next((self._tracked[base] for base in entity.__mro__ if base in self._tracked), None)

    def within(self, entity: type[Any]) -> Tracked | None:
        """Return how a class is tracked or, where it is not, the first subclass of it that is."""
        below = (self.of(mapper.class_) for mapper in inspect(entity).self_and_descendants)
        return next((each for each in below if each is not None), None)

    def of_table(self, table: Any) -> Tracked | None:
        """Return the tracked class that a table belongs to."""
        if not isinstance(table, Table):
            return None
        return next(
            (
                each
                for each in self
                if any(table in mapper.tables for mapper in inspect(each.entity).self_and_descendants)
            ),
            None,
        )

    def _listen(self, entity: type[Any]) -> None:
        # The mapper's events fire for exactly the rows a flush writes, cascades and orphans included.
        collector = _Collector(self, entity)
        event.listen(entity, "before_insert", collector.inserting, propagate=True)
        event.listen(entity, "after_insert", collector.inserted, propagate=True)
        # Before, because afterwards a value that the database computes has no history any more.
        event.listen(entity, "before_update", collector.updating, propagate=True)
        # Before, because only then the database still has what a row was when it was loaded in part.
        event.listen(entity, "before_delete", collector.deleting, propagate=True)


class Changes(list[Change]):
    """What a session's next flush hook will record, and for whom.

    `switched` marks a row that was deleted and added again in one flush: SQLAlchemy writes one UPDATE, and what the new
    object does not name keeps its old value.
    """

    def __init__(self, tracking: Tracking) -> None:
        super().__init__()
        self.tracking = tracking


class _Collector:
    """Puts every written row of a tracked class on its session's list; a session that keeps none is refused."""

    def __init__(self, tracking: Tracking, entity: type[Any]) -> None:
        self._tracking = tracking
        self._entity = entity

    def inserting(self, mapper: Mapper[Any], _connection: Any, row: Any) -> None:
        # In the place of one that is deleted in the same flush: SQLAlchemy announces an insert and writes an update.
        session = object_session(row)
        replaced = session and session.identity_map.get(mapper.identity_key_from_instance(row))
        if replaced is not None:
            self._collect(Operation.UPDATE, row, replaced)

    def inserted(self, _mapper: Any, _connection: Any, row: Any) -> None:
        self._collect(Operation.CREATE, row)

    def updating(self, _mapper: Any, _connection: Any, row: Any) -> None:
        session = object_session(row)
        if session is not None and session.is_modified(row, include_collections=False):
            self._collect(Operation.UPDATE, row)

    def deleting(self, _mapper: Any, _connection: Any, row: Any) -> None:
        self._collect(Operation.DELETE, row)

    def _collect(self, operation: Operation, row: Any, replaced: Any = None) -> None:
        tracked = self._tracking.of(type(row))
        # The listeners of a tracked base hear of its subclasses too; the nearest one speaks.
        if tracked is None or tracked.entity is not self._entity:
            return
        session = object_session(row)
        assert session is not None, "a flush always has its session"
        changes = changes_of(session, type(row))
        if changes.tracking is not self._tracking and changes.tracking.of(type(row)) is None:
            raise UntrackedWrite(f"{type(row).__name__} is tracked, but not by this session's manager")
        if changes.tracking is self._tracking:
            was = row if replaced is None else replaced
            before = None if operation is Operation.CREATE else tracked.key_of(AsItWas(was))
            changes.append(Change(operation, row, before, switched=replaced is not None))


def _function(mapping: Callable[[Any], str] | QueryableAttribute[Any]) -> Callable[[Any], str]:
    if isinstance(mapping, QueryableAttribute):
        name = mapping.key
        return lambda row: str(getattr(row, name))
    return mapping


def _column(mapping: Callable[[Any], str] | QueryableAttribute[Any]) -> QueryableAttribute[Any] | None:
    return mapping if isinstance(mapping, QueryableAttribute) else None


def _content(mapping: Callable[[Any], Any] | QueryableAttribute[Any] | None) -> Callable[[Any], Any]:
    if isinstance(mapping, QueryableAttribute):
        name = mapping.key
        return lambda row: getattr(row, name)
    return mapping or columns_of


def _text_column(mapping: Callable[[Any], Any] | QueryableAttribute[Any] | None) -> QueryableAttribute[Any] | None:
    # JSON columns are excluded: what is sent is serialised anew from what they hold.
    return mapping if isinstance(mapping, QueryableAttribute) and isinstance(mapping.type, String) else None


def _only_key(mapper: Mapper[Any]) -> QueryableAttribute[Any] | None:
    if len(mapper.primary_key) != 1:
        return None
    name = mapper.get_property_by_column(mapper.primary_key[0]).key
    return cast("QueryableAttribute[Any]", getattr(mapper.class_, name))


def changes_of(session: Session, entity: type[Any]) -> Changes:
    """Return the list of changes that a session's next flush hook will record. Raises `UntrackedWrite`."""
    changes = session.info.get("outbox_changes")
    if not isinstance(changes, Changes):
        raise UntrackedWrite(
            f"{entity.__name__} is tracked, but this session would record no event of the change; "
            "use manager.session() or manager.sync_session()"
        )
    return changes


def identity_of(row: Any) -> str:
    """Return the primary key as text; the parts of a composite key are percent-escaped and joined by '/'."""
    state = inspect(row.outbox_row if isinstance(row, AsItWas) else row)
    parts = state.identity or state.mapper.primary_key_from_instance(state.object)
    if len(parts) == 1:
        return str(parts[0])
    return "/".join(quote(str(part), safe="") for part in parts)


def columns_of(row: Any) -> dict[str, Any]:
    """Return the mapped columns by attribute name.

    Dates and times become ISO 8601 text, UUID and Decimal exact text; what JSON has no word for is refused later,
    with its path.
    """
    return {attribute.key: _plain(getattr(row, attribute.key)) for attribute in inspect(row).mapper.column_attrs}


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime, date, time)):
        return value.isoformat()
    if isinstance(value, (UUID, Decimal)):
        return str(value)
    return value
