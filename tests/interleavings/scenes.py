"""Scenes: what the families share. A secondary, hands and writers, and at the end everything that is owed delivered."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from outbox import SyncEvent, record
from tests.interleavings.hand import Hand, Writer
from tests.interleavings.player import Step
from tests.interleavings.stage import MIRROR, Stage
from tests.relaying import change
from tests.scripted import ScriptedSecondary

_DUE = """
update outbox_attempt set lease_until = statement_timestamp() - interval '1 second' where finished_at is null;
update outbox_hold set next_attempt_at = statement_timestamp() - interval '1 second'
where state <> 'dead' and event_ids <> '{}'
"""

# A dead event, and in log order what came after it, is nobody's to deliver.
_OWED = """
select pending - coalesce((
           select sum(cardinality(event_ids)) from outbox_hold
           where key_hash in (select key_hash from outbox_hold where state = 'dead')
       ), 0) as owed, in_flight
from outbox_lag
"""

_NEWEST = """
select distinct on (tenant_id, resource_id) resource_id, event_id, cast(content as text) as content,
       exists (
           select from outbox_hold
           where key_hash in (select key_hash from outbox_hold where state = 'dead') and event_id = any (event_ids)
       ) as dead
from outbox order by tenant_id, resource_id, event_id desc
"""


class Scene:
    """One order's world. Families say what is there at first, and who does what."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.secondary = ScriptedSecondary(MIRROR)
        # How many events there were, for families in which some are pruned.
        self.recorded: int | None = None

    def steps(self) -> Mapping[str, Iterable[Step]]:
        raise NotImplementedError

    async def waits(self, actor: str) -> bool:
        return await self.stage.waits(actor)

    async def watch(self) -> None:
        """What holds in every snapshot."""
        assert await self.stage.wrong(self.recorded) == []

    async def check(self) -> None:
        await self.drain()
        await self.converged()

    async def hand(self, actor: str, **terms: object) -> Hand:
        return Hand(await self.stage.connection(actor), self.secondary, **terms)

    async def writer(self, actor: str, event: SyncEvent, ending: str = "commit") -> Writer:
        return Writer(await self.stage.connection(actor), event, ending)

    async def write(self, *events: SyncEvent) -> list[int]:
        """Commit events; return their positions."""
        connection = await self.stage.connection("before")
        async with connection.transaction():
            return (await record(connection, events)).positions

    async def hold(self, name: str, step: object, *, due: bool = True) -> None:
        """Let a first event of a resource fail, so that its key is held; due again at once, or not for a while."""
        await self.write(change(name))
        self.secondary.script(name, step)  # type: ignore[arg-type]
        await (await self.hand("before")).carry()
        interval = "-1 second" if due else "1 hour"
        await self.stage.watching.execute(
            "update outbox_hold set next_attempt_at = statement_timestamp() + cast($1 as text)::interval "
            "where state <> 'dead'",
            interval,
        )

    async def drain(self) -> None:
        """What anybody left behind runs out, and one relay delivers all that is owed."""
        relay = await self.hand("after")
        for _ in range(12):
            owed, in_hand = await self.stage.watching.fetchrow(_OWED)
            if not owed:
                return
            await self.stage.watching.execute(_DUE)
            if in_hand:
                await relay.find_lost()
                await relay.take_over()
                await relay.commit()
                await self.stage.watching.execute(_DUE)
            await relay.carry()
            await self.watch()
        raise AssertionError("what is owed is not delivered")

    async def converged(self) -> None:
        """The secondary holds the newest event of each key, but for a dead one; in log order it was sent every one."""
        for row in await self.stage.watching.fetch(_NEWEST):
            if not row["dead"]:
                held = self.secondary.content_of("Thing", row["resource_id"])
                assert held == row["content"], f"{row['resource_id']} is not as event {row['event_id']} says"

    def started_in_order(self, *names: str) -> None:
        """No older event of a key was sent after a newer one."""
        for name in names:
            sent = self.secondary.sent_to(name)
            assert sent == sorted(sent), f"{name} was sent {sent}"
