"""The two ways to write: a session that captures, and a raw connection with events recorded by hand."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import SyncEvent, SyncManager, SyncToken, record
from tests.comparing import Note
from tests.model.model import Key

_PUT = """
insert into note (tenant_id, number, content) values (:tenant, :name, :content)
on conflict (tenant_id, number) do update set content = excluded.content
"""
_REMOVE = "delete from note where tenant_id = :tenant and number = :name"


class Captured:
    """One transaction of a session; every write is flushed, so that each is an event."""

    def __init__(self, manager: SyncManager) -> None:
        self._session = manager.session()
        self._savepoints = []

    async def begin(self) -> None:
        await self._session.begin()

    async def put(self, key: Key, content: str) -> None:
        await self._session.merge(Note(tenant_id=key[0], number=key[1], content=content))
        await self._session.flush()

    async def remove(self, key: Key) -> None:
        await self._session.delete(await self._session.get_one(Note, key))
        await self._session.flush()

    async def savepoint(self) -> None:
        self._savepoints.append(await self._session.begin_nested())

    async def undo(self) -> None:
        await self._savepoints.pop().rollback()

    async def commit(self) -> SyncToken | None:
        await self._session.commit()
        token = self._session.token
        await self._session.close()
        return token

    async def rollback(self) -> list[SyncToken]:
        await self._session.rollback()
        assert self._session.token is None
        await self._session.close()
        return []


class ByHand:
    """One transaction of a raw connection. Its tokens are known before it ends."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._connection = engine.connect()
        self._savepoints = []
        # A list for each savepoint that is open, and what was undone.
        self._tokens: list[list[SyncToken]] = [[]]
        self.undone: list[SyncToken] = []

    async def begin(self) -> None:
        await self._connection.start()
        self._transaction = await self._connection.begin()

    async def put(self, key: Key, content: str) -> None:
        await self._write(_PUT, {"tenant": key[0], "name": key[1], "content": content})
        await self._record(SyncEvent.update("Note", key[1], content, tenant_id=key[0]))

    async def remove(self, key: Key) -> None:
        await self._write(_REMOVE, {"tenant": key[0], "name": key[1]})
        await self._record(SyncEvent.delete("Note", key[1], tenant_id=key[0]))

    async def savepoint(self) -> None:
        self._savepoints.append(await self._connection.begin_nested())
        self._tokens.append([])

    async def undo(self) -> None:
        await self._savepoints.pop().rollback()
        self.undone += self._tokens.pop()

    async def commit(self) -> SyncToken | None:
        while self._savepoints:
            await self._savepoints.pop().commit()
        await self._transaction.commit()
        await self._connection.close()
        return SyncToken.merged(self.tokens) if self.tokens else None

    async def rollback(self) -> list[SyncToken]:
        await self._transaction.rollback()
        await self._connection.close()
        return self.tokens

    @property
    def tokens(self) -> list[SyncToken]:
        return [token for tokens in self._tokens for token in tokens]

    async def _write(self, sql: str, parameters: dict[str, str]) -> None:
        await self._connection.execute(text(sql), parameters)

    async def _record(self, event: SyncEvent) -> None:
        self._tokens[-1].append(await record(self._connection, event))
