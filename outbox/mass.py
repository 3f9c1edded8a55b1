"""Mass: which tracked class a bulk statement writes, how its rows come back, and what it must not change."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Delete, Update, inspect, select

from outbox.capture import Tracked, Tracking
from outbox.errors import UntrackedWrite

__all__ = ["recorded_by", "returning_rows", "written_by"]


def written_by(tracking: Tracking, statement: Any) -> Tracked | None:
    """Return how what a bulk statement may write is tracked: its class, or a subclass whose rows it reaches."""
    entity = _entity_of(statement)
    return tracking.of_table(statement.table) if entity is None else tracking.within(entity)


def recorded_by(tracking: Tracking, statement: Any) -> Tracked:
    """Return how all that a bulk statement writes is tracked.

    Raises `UntrackedWrite` for what is no update or delete of a tracked class, and for an update of what its resources
    go by: the events of its rows would name the new resources, and the old ones would stay for ever.
    """
    tracked = written_by(tracking, statement) if isinstance(statement, (Update, Delete)) else None
    entity = None if tracked is None else _entity_of(statement)
    if tracked is None or (entity is not None and not issubclass(entity, tracked.entity)):
        raise UntrackedWrite("execute_recorded: takes an update() or delete() of a tracked class")
    if isinstance(statement, Update) and (moved := _set_by(statement) & _names(tracked)):
        raise UntrackedWrite(
            f"execute_recorded: {', '.join(sorted(moved))} is what resources of {tracked.entity.__name__} go by; "
            "change the objects, so that what they were is deleted"
        )
    return tracked


def returning_rows(statement: Update | Delete, tracked: Tracked) -> Any:
    """Return the statement so that it answers with the objects it has written."""
    if "parententity" in statement.table._annotations:  # noqa: SLF001 - no public way tells a Core table
        return statement.returning(tracked.entity)
    return select(tracked.entity).from_statement(statement.returning(*statement.table.c))


def _entity_of(statement: Any) -> type[Any] | None:
    try:
        entity = statement.entity_description.get("entity")
    except KeyError:
        # A statement on a table whose criteria are attributes of a class.
        return None
    return None if entity is None else inspect(entity).mapper.class_


def _set_by(statement: Update) -> set[str]:
    # Columns, or what they were called by.
    values = statement._values or ()  # noqa: SLF001 - no public way tells what a statement sets
    return {value if isinstance(value, str) else value.key for value in values}


def _names(tracked: Tracked) -> set[str]:
    mapper = inspect(tracked.entity)
    named = [each for each in (tracked.tenant_column, tracked.resource_id_column) if not isinstance(each, str)]
    columns = [*mapper.primary_key, *(column for each in named if each is not None for column in each.property.columns)]
    return {column.key for column in columns}
