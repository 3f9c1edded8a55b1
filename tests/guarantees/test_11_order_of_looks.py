"""Guarantee 11: a look reads the primary, then what is owed, then the secondary; no other order tells no lies."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.listing import PrimaryRow
from outbox.secondaries.base import ResourceDigest
from outbox.source import Source
from tests.comparing import NORTH, Between, Interrupted, World, said


class ThenMore(Interrupted):
    """Awaits `after_find` once, after it next read single resources and before anybody has its answer."""

    after_find: Between | None = None

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> Sequence[ResourceDigest]:
        found = await super().find(tenant_id, resource_type, resource_ids)
        if (action := self.after_find) is not None:
            self.after_find = None
            await action()
        return found


class Late(Source):
    """Awaits `before_find` once, before it next reads single resources."""

    before_find: Between | None = None

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> dict[str, PrimaryRow]:
        if (action := self.before_find) is not None:
            self.before_find = None
            await action()
        return await super().find(tenant_id, resource_type, resource_ids)


async def test_what_arrives_right_after_the_secondary_was_read_is_no_drift(primary: AsyncEngine) -> None:
    """R4: it was owed when the secondary was read, and is no more when somebody looks afterwards."""
    secondary = ThenMore("mirror")
    world = await World(primary, secondary).open()
    await world.write(["1"])
    await world.relay()
    await world.write(["1"], "second")
    secondary.after_find = world.relay
    verdict = await world.judge().judge(*NORTH, ["1"])
    assert secondary.content_of("Note", "1", tenant_id="north") == said("second"), "nothing arrived in between"
    assert (verdict.drifts, verdict.others) == ([], {"owed": 1})


async def test_what_commits_right_after_what_is_owed_was_read_is_no_drift(primary: AsyncEngine) -> None:
    """R4: it is in the primary's row and was not owed a moment before."""
    world = await World(primary, Interrupted("mirror")).open()
    world.source = late = Late(primary, world.manager.tracking)
    await world.write(["1"])
    await world.relay()

    async def commit() -> None:
        await world.write(["1"], "second")

    late.before_find = commit
    verdict = await world.judge().judge(*NORTH, ["1"])
    assert world.secondary.content_of("Note", "1", tenant_id="north") == said("first")
    assert (verdict.drifts, verdict.others) == ([], {"moved": 1})
