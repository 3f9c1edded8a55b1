"""Before: a row as the database has it, while a flush writes what it has become."""

from __future__ import annotations

from inspect import getattr_static
from typing import Any

from sqlalchemy import inspect, select
from sqlalchemy.ext.hybrid import hybrid_property

__all__ = ["AsItWas"]


class AsItWas:
    """A row as the database has it: changed attributes show their old values. What mappings of a key are asked with.

    A property is computed from them anew; what a method computes it computes of the row as it is.
    """

    def __init__(self, row: Any) -> None:
        self.outbox_row = row

    def __getattr__(self, name: str) -> Any:
        """Return the attribute as it was loaded, or as the database still has it."""
        state = inspect(self.outbox_row)
        if name in state.mapper.synonyms:
            return getattr(self, state.mapper.synonyms[name].name)
        if name in state.mapper.column_attrs:
            return self._column(state, name)
        found = getattr_static(type(self.outbox_row), name, None)
        if isinstance(found, (property, hybrid_property)) and found.fget is not None:
            return found.fget(self)
        return getattr(self.outbox_row, name)

    def _column(self, state: Any, name: str) -> Any:
        history = state.attrs[name].history
        if not history.added:
            return getattr(self.outbox_row, name)
        return history.deleted[0] if history.deleted else self._stored(state, name)

    def _stored(self, state: Any, name: str) -> Any:
        # Set without having been loaded, as after a commit; the row has not been written yet.
        keys = zip(state.mapper.primary_key, state.identity, strict=True)
        statement = select(getattr(state.mapper.class_, name)).where(*(column == value for column, value in keys))
        return state.session.execute(statement).scalar_one()
