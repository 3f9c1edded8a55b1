"""Operate: what an operator does about failures and secondaries: try again, give up, pause, resume."""

from __future__ import annotations

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.errors import SettingsError, UnknownSecondary
from outbox.settings import SyncConfig
from outbox.statement import Statement
from outbox.turn import ALL_TURNS

__all__ = ["COUNT", "DISCARD", "GO_ON", "PAUSE", "REDRIVE", "Operator", "Which"]

_LONGEST_REASON = 1_024

# What an attempt has in hand is left to it: its outcome decides.
_CHOSEN = """
    hold.state in ('retrying', 'dead') and (hold.state = 'dead' or hold.next_attempt_at is not null)
      and (cast(:backend_id as text) is null or hold.backend_id = :backend_id)
      and (cast(:tenant_id as text) is null or hold.tenant_id = :tenant_id)
      and (cast(:resource_type as text) is null or hold.resource_type = :resource_type)
      and (cast(:resource_id as text) is null or hold.resource_id = :resource_id)
      and (cast(:error_code as text) is null or hold.error_code = :error_code)
      and (cast(:state as text) is null or hold.state = :state)"""

COUNT = Statement(
    """
select count(*) as keys from {schema}.outbox_hold as hold
where [chosen]
""".replace("[chosen]", _CHOSEN)
)

# What may have killed its relay stays under suspicion: it is dispatched with nobody beside it.
REDRIVE = Statement(
    """
with again as (
    update {schema}.outbox_hold as hold
    set state = 'released', attempts = 0, lost = 0, first_failed_at = null, next_attempt_at = statement_timestamp()
    where [chosen]
    returning hold.backend_id
)
select count(*) as keys from again
""".replace("[chosen]", _CHOSEN)
)

# What is given up is written down before it is forgotten: nobody who waits for it may be told that it arrived.
DISCARD = Statement(
    """
with gone as (
    delete from {schema}.outbox_hold as hold
    where [chosen]
    returning hold.*
), behind as (
    delete from {schema}.outbox_hold as behind
    using gone
    where behind.backend_id = gone.backend_id and behind.key_hash = gone.key_hash
      and behind.tenant_id = gone.tenant_id and behind.resource_type = gone.resource_type
      and behind.resource_id = gone.resource_id and behind.page > 0
    returning behind.*
), lot as materialized (
    select backend_id, key_hash, tenant_id, resource_type, resource_id, min(oldest_id) as oldest_id,
           max(event_ids[cardinality(event_ids)]) as event_id, cast(sum(cardinality(event_ids)) as integer) as events,
           max(attempts) as attempts, max(error_code) as error_code
    from (select * from gone union all select * from behind) as row
    group by backend_id, key_hash, tenant_id, resource_type, resource_id
), noted as (
    insert into {schema}.outbox_discarded
        (backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts, error_code,
         reason)
    select backend_id, key_hash, event_id, oldest_id, tenant_id, resource_type, resource_id, events, attempts,
           error_code, cast(:reason as text)
    from lot
), counted as (
    update {schema}.outbox_secondary as secondary set discarded = secondary.discarded + given_up.events
    from (select backend_id, sum(events) as events from lot group by backend_id) as given_up
    where secondary.backend_id = given_up.backend_id
)
select count(*) as keys from lot
""".replace("[chosen]", _CHOSEN)
)

PAUSE = Statement("""
update {schema}.outbox_secondary set status = 'paused'
where backend_id = :backend_id and status in ('live', 'paused')
returning status
""")

GO_ON = Statement("""
update {schema}.outbox_secondary set status = 'live'
where backend_id = :backend_id and status in ('live', 'paused')
returning status
""")


class Which(msgspec.Struct, frozen=True):
    """Which failures are meant: those that match all that is given. `state` is `retrying` or `dead`.

    Raises `SettingsError` for another state.
    """

    backend_id: str | None = None
    tenant_id: str | None = None
    resource_type: str | None = None
    resource_id: str | None = None
    error_code: str | None = None
    state: str | None = None

    def __post_init__(self) -> None:
        if self.state not in (None, "retrying", "dead"):
            raise SettingsError("state", "must be retrying or dead")


class Operator:
    """What an operator does, on the primary behind `engine`. The front door is one."""

    engine: AsyncEngine
    config: SyncConfig

    def ring(self) -> None:
        """Tell the relays that something is due."""
        raise NotImplementedError

    async def redrive(self, which: Which | None = None, *, dry_run: bool = False) -> int:
        """Try failures again at once, all or those that match, with all attempts before them; return how many keys."""
        if dry_run:
            return await self._count(which or Which())
        keys = await self._touch(REDRIVE, which or Which())
        self.ring()
        return keys

    async def discard(self, which: Which, *, reason: str, dry_run: bool = False) -> int:
        """Give up failures that match, and note why (1 to 1,024 characters); return how many keys.

        Whoever waits for such an event is told that it was discarded; a newer event of its key is delivered as usual.
        """
        if not 1 <= len(reason) <= _LONGEST_REASON or not reason.isprintable():
            raise SettingsError("reason", f"must have 1 to {_LONGEST_REASON} printable characters")
        if dry_run:
            return await self._count(which)
        return await self._touch(DISCARD, which, reason=reason)

    async def pause(self, backend_id: str) -> None:
        """Carry nothing more to a secondary, from the next claim on; what is owed to it is kept and grows.

        Raises `UnknownSecondary` for one that is not there, or neither live nor paused; so does `resume`.
        """
        await self._turn_to(PAUSE, backend_id)

    async def resume(self, backend_id: str) -> None:
        """Carry again to a secondary that was paused."""
        await self._turn_to(GO_ON, backend_id)
        self.ring()

    async def _turn_to(self, statement: Statement, backend_id: str) -> None:
        sql = text(statement.on(self.config.database_schema))
        async with self.engine.begin() as connection:
            row = (await connection.execute(sql, {"backend_id": backend_id})).one_or_none()
        if row is None:
            raise UnknownSecondary(backend_id, "the registry has no such secondary that is live or paused")

    async def _count(self, which: Which) -> int:
        async with self.engine.connect() as connection:
            sql = text(COUNT.on(self.config.database_schema))
            return int((await connection.execute(sql, msgspec.structs.asdict(which))).scalar_one())

    async def _touch(self, statement: Statement, which: Which, **more: str) -> int:
        schema, chosen = self.config.database_schema, msgspec.structs.asdict(which)
        async with self.engine.begin() as connection:
            # The registry before the holds, as in a claim: the other way round they would wait for each other.
            await connection.execute(text(ALL_TURNS.on(schema)), {"backend_id": which.backend_id})
            return int((await connection.execute(text(statement.on(schema)), chosen | more)).scalar_one())
