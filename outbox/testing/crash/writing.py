"""Writing: transactions of every kind against the primary, each told to the history as its writer saw it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence

from sqlalchemy import Text, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox.answer import SyncStatus
from outbox.content import content_digest
from outbox.event import StoredResource, SyncEvent
from outbox.manager import SyncManager
from outbox.primary import PRIMARY_FAILED
from outbox.session import OutboxSession
from outbox.settings import SyncMode
from outbox.testing.crash.remote import DEADLY, POISON
from outbox.testing.crash.terms import Terms
from outbox.testing.history import History
from outbox.testing.records import Began, Did, Ended, Entry, Recorded, Told, Undone, Waiting
from outbox.token import SyncToken

__all__ = ["Item", "create_items", "track_items", "write"]

_TENANTS = ("acme", "globex", "initech")
_TASKS = 4
# Few, since each such event kills a relay as often as it may be tried.
_DEADLY_KEYS = 20
_BULKS = 0.35
_PER_BULK = (40, 120)
# The position that this session's flush drew last.
_POSITION = text("select currval('public.outbox_event_id_seq')")
_STORE = text("""
insert into item (tenant_id, resource_id, content)
select :tenant_id, given.* from unnest(cast(:names as text[]), cast(:contents as text[])) as given
on conflict (tenant_id, resource_id) do update set content = excluded.content
""")
_MOST_OWED = 1_000
_OWED = text("""
select (select count(*) from (select from public.outbox_delivery limit :most) as owed)
     + (select count(*) from public.outbox_hold where state in ('released', 'retrying'))
""")
_OF_BULK = text("select event_id, resource_id from public.outbox where bulk_id = :bulk_id")


class _Rows(DeclarativeBase):
    pass


class Item(_Rows):
    """The business's own row."""

    __tablename__ = "item"

    tenant_id: Mapped[str] = mapped_column(Text, primary_key=True)
    resource_id: Mapped[str] = mapped_column(Text, primary_key=True)
    content: Mapped[str] = mapped_column(Text)


async def create_items(engine: AsyncEngine) -> None:
    """Create the business's table."""
    async with engine.begin() as connection:
        await connection.run_sync(_Rows.metadata.create_all)


def track_items(manager: SyncManager) -> None:
    """Have the manager record the changes of items."""
    manager.track(Item, resource_type="Item", tenant=Item.tenant_id, resource_id=Item.resource_id, content=_content)


async def write(terms: Terms, name: str, manager: SyncManager, history: History, stopped: asyncio.Event) -> None:
    """Write until told to stop, in several transactions at once."""
    track_items(manager)
    async with asyncio.TaskGroup() as group:
        for number in range(_TASKS):
            author = _Author(terms, f"{name}.{number}", manager, history)
            group.create_task(author.write_until(stopped))


def _key(number: int) -> tuple[str, str]:
    return (_TENANTS[number % len(_TENANTS)], f"r{number}")


def _content(item: Item) -> str:
    return item.content


class _Author:
    """One after the other, random transactions; what is random follows from the seed and the author's name."""

    def __init__(self, terms: Terms, name: str, manager: SyncManager, history: History) -> None:
        self._terms = terms
        self._name = name
        self._manager = manager
        self._history = history
        self._random = random.Random(f"{terms.seed} {name}")  # noqa: S311 - not a secret
        self._count = 0

    async def write_until(self, stopped: asyncio.Event) -> None:
        """Write, resting a moment after each transaction, and longer while the primary is away; some are waited for."""
        async with asyncio.TaskGroup() as waits:
            while not stopped.is_set():
                self._count += 1
                name = f"{self._name}.{self._count}"
                token = await self._write(name)
                if token is not None and self._random.random() < 0.1:
                    waits.create_task(self._wait(name, token))
                await asyncio.sleep(self._random.uniform(0.005, 0.03) if token is not None else 0.05)

    async def _write(self, transaction: str) -> SyncToken | None:
        self._history.write(Began(transaction=transaction))
        how = "rolled_back"
        try:
            async with self._manager.session(expire_on_commit=False) as session:
                many = self._random.random() < _BULKS and await self._few_owed(session)
                change = self._change_many if many else self._change
                await change(session, transaction)
                if self._random.random() < 0.1:
                    await session.rollback()
                    return None
                # From here on only the answer tells, and it may never come.
                how = "unknown"
                await session.commit()
                how = "committed"
                if many:
                    self._history.write(Did(operation="bulk"))
                return session.token
        except PRIMARY_FAILED:
            return None
        finally:
            self._history.write(Ended(transaction=transaction, how=how))

    async def _few_owed(self, session: OutboxSession) -> bool:
        """Whether relays keep up: what is owed when faults end must arrive within seconds, also on a slow machine."""
        return int((await session.execute(_OWED, {"most": _MOST_OWED})).scalar_one()) < _MOST_OWED

    async def _change(self, session: OutboxSession, transaction: str) -> None:
        """Change one to three resources, in the order of their keys, so that nobody waits in a circle."""
        numbers = self._random.sample(range(self._terms.hot_keys), self._random.choice((1, 1, 1, 2, 3, 5)))
        for number in sorted(numbers, key=_key):
            if self._random.random() < 0.15:
                await self._change_and_undo(session, transaction, number)
            await self._change_one(session, transaction, number)

    async def _change_many(self, session: OutboxSession, transaction: str) -> None:
        """Change many resources of one tenant in one statement, in the order of their keys as well."""
        tenant_id = self._random.choice(_TENANTS)
        # Who kills whoever hands it over is written singly.
        numbers = [each for each in range(_DEADLY_KEYS, self._terms.keys) if _key(each)[0] == tenant_id]
        names = {number: _key(number)[1] for number in self._random.sample(numbers, self._random.randint(*_PER_BULK))}
        contents = {names[number]: self._anything(transaction, number) for number in sorted(names, key=_key)}
        parameters = {"tenant_id": tenant_id, "names": list(contents), "contents": list(contents.values())}
        await session.execute(_STORE, parameters)
        stored = [
            StoredResource(tenant_id=tenant_id, resource_type="Item", resource_id=name, content=content)
            for name, content in contents.items()
        ]
        events = SyncEvent.bulk(stored, tenant_id=tenant_id)
        await session.run_sync(lambda _: session.sync_session.write(events))
        rows = (await session.execute(_OF_BULK, {"bulk_id": events[0].bulk_id})).all()
        entries = [Entry(row[0], tenant_id, "Item", row[1], content_digest(contents[row[1]])) for row in rows]
        assert len(entries) == len(contents), "every resource of a bulk has its event"
        self._history.write(Recorded(transaction=transaction, entries=entries))

    async def _change_and_undo(self, session: OutboxSession, transaction: str, number: int) -> None:
        savepoint = await session.begin_nested()
        position = await self._change_one(session, transaction, number)
        await savepoint.rollback()
        self._history.write(Undone(transaction=transaction, positions=[position]))

    async def _change_one(self, session: OutboxSession, transaction: str, number: int) -> int:
        key = _key(number)
        item = await session.get(Item, key, with_for_update=True, populate_existing=True)
        content: str | None = None
        if item is not None and self._random.random() < 0.25:
            await session.delete(item)
        elif item is not None:
            item.content = content = self._anything(transaction, number)
        else:
            content = self._anything(transaction, number)
            session.add(Item(tenant_id=key[0], resource_id=key[1], content=content))
        await session.flush()
        position = int((await session.execute(_POSITION)).scalar_one())
        entry = Entry(position, key[0], "Item", key[1], "" if content is None else content_digest(content))
        self._history.write(Recorded(transaction=transaction, entries=[entry]))
        return position

    def _anything(self, transaction: str, number: int) -> str:
        """Mostly what nobody wrote before; where that is asked for, what cannot be delivered."""
        drawn = self._random.random()
        if "poison" in self._terms.faults and drawn < self._terms.numbers.poison:
            return f'{{{POISON}:true,"by":"{transaction}","number":{number}}}'
        if "deadly" in self._terms.faults and 0.5 < drawn < 0.52 and number < _DEADLY_KEYS:
            return f'{{{DEADLY}:true,"by":"{transaction}","number":{number}}}'
        return json.dumps({"by": transaction, "number": number, "draw": drawn})

    async def _wait(self, name: str, token: SyncToken) -> None:
        self._history.write(Waiting(wait=name, positions=token.positions, backend_ids=token.backend_ids))
        done: Sequence[str] = ()
        try:
            # Half of those who wait carry their own events.
            mode = self._random.choice((None, SyncMode.SYNCHRONOUS))
            waiting = self._manager.sync(token, mode=mode, timeout=2) if mode else self._wait_only(token)
            done = [status.backend_id for status in await waiting if status.synced]
        except PRIMARY_FAILED:
            pass
        self._history.write(Told(wait=name, done=list(done)))

    async def _wait_only(self, token: SyncToken) -> list[SyncStatus]:
        return list(await self._manager.wait_for_sync(token, timeout=2))
