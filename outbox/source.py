"""Source: the primary's side of a comparison, read from the tracked classes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Select, cast, func, literal_column, select
from sqlalchemy.dialects.postgresql import BIT
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import QueryableAttribute, Session

from outbox.capture import Tracked, Tracking
from outbox.content import content_digest
from outbox.errors import InvalidEvent
from outbox.event import Operation, SyncEvent
from outbox.listing import Listing, PrimaryRow, rows_of, sorts_by_bytes
from outbox.narrowing import identified, of_tenant, tells_tenants
from outbox.secondaries.base import Summary

__all__ = ["InPrimary", "Source"]

_PAGE = 500


class InPrimary(msgspec.Struct, frozen=True):
    """One resource as the primary holds it; where its type is not `tracked`, nobody can tell and the rest is empty.

    What is `present` and has no `digest` no event can carry.
    """

    tracked: bool
    present: bool = False
    version: str | None = None
    digest: str | None = None


class Source:
    """Reads tracked classes. What neither a column nor the primary key names is found only by reading all of it."""

    def __init__(self, engine: AsyncEngine, tracking: Tracking) -> None:
        self._engine = engine
        self._tracking = tracking

    @property
    def resource_types(self) -> list[str]:
        """What is tracked."""
        return sorted({each.resource_type for each in self._tracking})

    async def scopes(self, tenant_id: str | None, resource_type: str | None) -> set[tuple[str, str]]:
        """Return every (tenant_id, resource_type) there is to compare, narrowed by what is given."""
        found: set[tuple[str, str]] = set()
        for tracked in self._of(resource_type):
            tenants = {tenant_id} if tenant_id else await self._tenants(tracked)
            found |= {(tenant, tracked.resource_type) for tenant in tenants}
        return found

    def pages(
        self, tenant_id: str, resource_type: str, after: str | None = None, through: str | None = None
    ) -> AsyncIterator[list[PrimaryRow]]:
        """List a tenant's resources of a type with `after` < id <= `through`, by the UTF-8 bytes of the id."""
        return self._listing(tenant_id, resource_type).pages(after, through)

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> dict[str, PrimaryRow]:
        """Return those of the resources that are there now."""
        tracked = self._tracked(resource_type)
        statement = _matching(tracked, tenant_id, resource_ids)
        wanted = {(tenant_id, name) for name in resource_ids}
        async with AsyncSession(self._engine) as session:
            found = await session.run_sync(
                lambda loading: rows_of(tracked, tenant_id, self._rows(loading, statement, tracked, wanted))
            )
        return {row.resource_id: row for row in found}

    async def locked(
        self, session: AsyncSession, tenant_id: str, resource_type: str, resource_ids: Sequence[str]
    ) -> dict[str, SyncEvent | None]:
        """Return the primary's state of some resources as update events; their rows stay locked by the transaction.

        A row that no event can carry has None. Rows that somebody else has locked are left out: nobody waits for us,
        and we for nobody.
        """
        tracked = self._tracked(resource_type)
        statement = _matching(tracked, tenant_id, resource_ids).with_for_update(skip_locked=True, of=tracked.entity)
        return await self._events(session, statement, tracked, {(tenant_id, name) for name in resource_ids})

    def delete(self, tenant_id: str, resource_type: str, resource_id: str) -> SyncEvent | None:
        """Return the delete of a resource; None where no event can name it."""
        limits = self._tracked(resource_type).limits
        return _unless_invalid(lambda: SyncEvent.delete(resource_type, resource_id, tenant_id=tenant_id, limits=limits))

    async def in_primary(
        self, session: AsyncSession, tenant_id: str, resource_type: str, resource_id: str
    ) -> InPrimary:
        """Return what the session's transaction sees of one resource; locks nothing."""
        if (tracked := next(self._of(resource_type), None)) is None:
            return InPrimary(tracked=False)
        statement = _matching(tracked, tenant_id, [resource_id])
        found = await self._events(session, statement, tracked, {(tenant_id, resource_id)})
        event = found.get(resource_id)
        if event is None:
            return InPrimary(tracked=True, present=resource_id in found)
        assert event.content is not None, "an update has its content"
        return InPrimary(True, True, event.version, content_digest(event.content))

    async def can_sum(self, resource_type: str) -> bool:
        """Whether the database itself can sum up ranges: the content is a text column, the id's index is by bytes."""
        tracked = self._tracked(resource_type)
        column = tracked.resource_id_column
        if column is None or tracked.content_column is None or not tells_tenants(tracked):
            return False
        # Rows of a class that is tracked for itself are in the same table, and not this type's.
        alone = not any(issubclass(each.entity, tracked.entity) for each in self._tracking if each is not tracked)
        return alone and await sorts_by_bytes(self._engine, column)

    async def summarise(self, tenant_id: str, resource_type: str, after: str | None, through: str | None) -> Summary:
        """Return the summary of a range, see `Summable`; only where `can_sum`."""
        tracked = self._tracked(resource_type)
        identity = tracked.resource_id_column
        assert identity is not None
        assert tracked.content_column is not None
        hashed = func.md5(identity.concat("\n").concat(tracked.content_column))
        number = cast(cast(literal_column("'x'").concat(func.substr(hashed, 1, 15)), BIT(60)), BigInteger)
        total: Any = select(func.count(), func.coalesce(func.sum(number), 0)).select_from(tracked.entity)
        statement = _between(of_tenant(total, tracked, tenant_id), identity, after, through)
        async with self._engine.connect() as connection:
            count, found = (await connection.execute(statement)).one()
        return Summary(count, int(found))

    async def boundary(self, tenant_id: str, resource_type: str, after: str | None, step: int) -> str | None:
        """Return the id `step` places above `after`, None when there are not as many; only where `can_sum`."""
        tracked = self._tracked(resource_type)
        identity = tracked.resource_id_column
        assert identity is not None
        walk = of_tenant(select(identity), tracked, tenant_id).order_by(identity).offset(step - 1).limit(1)
        async with self._engine.connect() as connection:
            found: str | None = await connection.scalar(_between(walk, identity, after, None))
        return found

    def _of(self, resource_type: str | None) -> Iterator[Tracked]:
        return (each for each in self._tracking if resource_type in (None, each.resource_type))

    def _tracked(self, resource_type: str) -> Tracked:
        return next(self._of(resource_type))

    def _listing(self, tenant_id: str, resource_type: str) -> Listing:
        return Listing(self._engine, self._tracked(resource_type), tenant_id, self._is_of, _PAGE)

    def _is_of(self, tracked: Tracked, row: Any) -> bool:
        """Whether a row is this class's, and not of a subclass that is tracked for itself."""
        return self._tracking.of(type(row)) is tracked

    async def _tenants(self, tracked: Tracked) -> set[str]:
        column = tracked.tenant_column
        if isinstance(column, str):
            return {column}
        async with AsyncSession(self._engine) as session:
            if column is not None:
                return {str(tenant) for tenant in await session.scalars(select(column).distinct())}
            rows = await session.stream_scalars(select(tracked.entity).execution_options(yield_per=_PAGE))
            return {tracked.tenant(row) async for row in rows}

    async def _events(
        self, session: AsyncSession, statement: Select[Any], tracked: Tracked, wanted: set[tuple[str, str]]
    ) -> dict[str, SyncEvent | None]:
        """Return update events of what is there, by id; None for what no event can carry."""
        return await session.run_sync(
            lambda loading: {
                tracked.resource_id(row): _unless_invalid(partial(tracked.event, Operation.UPDATE, row))
                for row in self._rows(loading, statement, tracked, wanted)
            }
        )

    def _rows(
        self, session: Session, statement: Select[Any], tracked: Tracked, wanted: set[tuple[str, str]]
    ) -> Iterator[Any]:
        """Read objects; whoever makes events of them does so meanwhile, so that a content may load what it needs."""
        rows = session.scalars(statement)
        # Objects that are read page by page come and go, and their identities with them.
        for row in rows if "yield_per" in statement.get_execution_options() else rows.unique():
            if tracked.key_of(row) in wanted and self._is_of(tracked, row):
                yield row


def _unless_invalid(event: Callable[[], SyncEvent]) -> SyncEvent | None:
    try:
        return event()
    except InvalidEvent:
        return None


def _matching(tracked: Tracked, tenant_id: str, resource_ids: Sequence[str]) -> Select[Any]:
    statement = of_tenant(select(tracked.entity), tracked, tenant_id)
    condition = identified(tracked, resource_ids)
    # Where no index finds them, most of what is read is not meant.
    return statement.execution_options(yield_per=_PAGE) if condition is None else statement.where(condition)


def _between(
    statement: Select[Any], column: QueryableAttribute[Any], after: str | None, through: str | None
) -> Select[Any]:
    if after is not None:
        statement = statement.where(column > after)
    return statement if through is None else statement.where(column <= through)
