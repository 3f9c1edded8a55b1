"""Filling: one page of a backfill as one transaction, and what of it was locked afterwards, row by row.

The rows are locked while their events draw positions, so that a key's positions stay in commit order: whoever wrote
before has drawn his, whoever writes later draws a later one. The locks are FOR SHARE: they keep the writers of a row
apart from us, but neither foreign keys nor a backfill of another secondary. What somebody has locked is passed by and
waited for afterwards, one row at a time, holding nothing that an application waits for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from outbox.errors import UnknownSecondary
from outbox.paging import Extent, Key, Taken
from outbox.record import record
from outbox.statement import Statement

__all__ = ["ADVANCE", "BOUNDS", "CURSOR", "DEADLINE", "Filler", "Page", "Refusal"]

# Held for a page: of several backfills of a scope one records at a time.
CURSOR = Statement("""
select after, finished_at is not null as finished
from {schema}.outbox_backfill
where backend_id = :backend_id and tenant_id = :tenant_id and resource_type = :resource_type
for update
""")

ADVANCE = Statement("""
update {schema}.outbox_backfill
set after = cast(:after as text), recorded = recorded + cast(:recorded as bigint),
    refused = refused + cast(:refused as bigint), advanced_at = clock_timestamp(),
    finished_at = case when cast(:finished as boolean) then clock_timestamp() end
where backend_id = :backend_id and tenant_id = :tenant_id and resource_type = :resource_type
""")

# A process that is stopped in the middle of a page must not keep its locks.
BOUNDS = Statement("""
select set_config('lock_timeout', '1s', true), set_config('idle_in_transaction_session_timeout', '15s', true)
""")

# From the first lock on a row; to find the next keys may take its time. The last is new in PostgreSQL 17.
DEADLINE = Statement("""
select set_config(bound.name, '15s', true)
from unnest(array['statement_timeout', 'transaction_timeout']) as bound (name)
where current_setting(bound.name, true) is not null
""")

# A lock that did not come in time, and a deadlock in which we were the victim.
_BUSY = ("55P03", "40P01")

_T = TypeVar("_T")


class Refusal(msgspec.Struct, frozen=True):
    """A row that no event can carry exactly, by its primary key; `problem` names the path, never the value."""

    resource_type: str
    key: str
    problem: str


class Page(msgspec.Struct):
    """What became of a page: `missing` are rows that others have locked; `last` that nothing comes after it."""

    start: str | None
    after: str | None
    last: bool
    missing: list[Key] = msgspec.field(default_factory=list)
    positions: list[int] = msgspec.field(default_factory=list)
    refusals: list[Refusal] = msgspec.field(default_factory=list)


class Filler:
    """Records the pages of scopes for one secondary."""

    def __init__(self, engine: AsyncEngine, schema: str, backend_id: str) -> None:
        self._engine = engine
        self._schema = schema
        self._backend_id = backend_id

    async def page(self, extent: Extent, size: int) -> Page:
        """Record the next page of a scope, but for the rows that somebody has locked."""
        return await self.patiently(partial(self._look, extent, size))

    async def come_back(self, extent: Extent, page: Page) -> None:
        """Wait for one of the rows that were locked; when it does not come soon, another has its turn."""
        key = page.missing.pop(0)
        try:
            await self._transaction(partial(self._look_again, extent, page, key))
        except DBAPIError as error:
            _unless_busy(error)
            page.missing.append(key)

    async def patiently(self, work: Callable[[Session], _T]) -> _T:
        """Run a short transaction, again for as long as what it needs is locked."""
        while True:
            try:
                return await self._transaction(work)
            except DBAPIError as error:
                _unless_busy(error)

    def run(self, session: Session, statement: Statement, **parameters: Any) -> Any:
        """Run a statement about this secondary."""
        return session.execute(text(statement.on(self._schema)), parameters | {"backend_id": self._backend_id})

    async def _transaction(self, work: Callable[[Session], _T]) -> _T:
        async with AsyncSession(self._engine, autoflush=False) as session, session.begin():
            # A snapshot older than the locks would show rows as they no longer are.
            await session.connection(execution_options={"isolation_level": "READ COMMITTED"})
            await session.execute(text(BOUNDS.on(self._schema)))
            return await session.run_sync(work)

    def _look(self, extent: Extent, size: int, session: Session) -> Page:
        cursor = self._cursor(session, extent)
        if cursor.finished:
            return Page(cursor.after, cursor.after, last=True)
        start = None if cursor.after is None else msgspec.json.decode(cursor.after, type=Key)
        keys = extent.keys(session, start, size)
        page = Page(cursor.after, cursor.after, last=len(keys) < size)
        if keys:
            page.after = msgspec.json.encode(keys[-1]).decode()
            self.run(session, DEADLINE)
            taken = extent.take(session, keys)
            self._record(session, extent, page, taken)
            # What is not among them is locked, or gone by now.
            page.missing = [key for key in keys if key not in {each.key for each in taken}]
        if not page.missing:
            self._advance(session, extent, page)
        return page

    def _look_again(self, extent: Extent, page: Page, key: Key, session: Session) -> None:
        cursor = self._cursor(session, extent)
        if cursor.finished or cursor.after != page.start:
            # Another backfill has recorded this page meanwhile, or has begun anew.
            page.missing, page.last = [], cursor.finished
            return
        self.run(session, DEADLINE)
        self._record(session, extent, page, extent.wait_for(session, key))
        if not page.missing:
            self._advance(session, extent, page)

    def _record(self, session: Session, extent: Extent, page: Page, taken: Sequence[Taken]) -> None:
        """Record events; their positions are drawn now, with the rows locked."""
        page.refusals += [
            Refusal(extent.resource_type, "/".join(each.key), str(each.problem)) for each in taken if each.problem
        ]
        events = [each.event for each in taken if each.event is not None]
        if not events:
            return
        token = record(session.connection(), events, schema=self._schema, backend_ids=[self._backend_id])
        if any(each.backend_ids != (self._backend_id,) for each in token.recorded):
            raise UnknownSecondary(self._backend_id, "it is not owed these resources any more")
        page.positions += token.positions

    def _cursor(self, session: Session, extent: Extent) -> Any:
        row = self.run(session, CURSOR, tenant_id=extent.tenant_id, resource_type=extent.resource_type).one_or_none()
        if row is None:
            raise UnknownSecondary(self._backend_id, "its backfill was taken away while it ran")
        return row

    def _advance(self, session: Session, extent: Extent, page: Page) -> None:
        self.run(
            session,
            ADVANCE,
            tenant_id=extent.tenant_id,
            resource_type=extent.resource_type,
            after=page.after,
            recorded=len(page.positions),
            refused=len(page.refusals),
            finished=page.last,
        )


def _unless_busy(error: DBAPIError) -> None:
    """Raise an error again unless trying again is all it takes."""
    # Its text would quote the parameters, which are keys.
    error.hide_parameters = True
    if getattr(error.orig, "sqlstate", None) not in _BUSY:
        raise error
