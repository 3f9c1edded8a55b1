"""A reconcile with repair in a process of its own, which says when it has come to a step and stays there to be killed.

As a program it takes the primary's URL and the step: `listing`, `restoring` or `removing`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from outbox.event import SyncEvent
from outbox.listing import PrimaryRow
from outbox.secondaries.sql import SqlSecondary
from outbox.source import Source
from tests.comparing import World


class Stopping(Source):
    """Stays at its step for ever; `removing` is the second look at what is only on the secondary."""

    step = ""
    locks = 0

    async def find(self, tenant_id: str, resource_type: str, resource_ids: Sequence[str]) -> dict[str, PrimaryRow]:
        if self.step == "listing" or (self.step == "removing" and self.locks):
            await stay()
        return await super().find(tenant_id, resource_type, resource_ids)

    async def locked(self, session: AsyncSession, *key: Any) -> dict[str, SyncEvent | None]:
        self.locks += 1
        found = await super().locked(session, *key)
        if self.step == "restoring":
            await stay()
        return found


async def stay() -> None:
    """Say that it is here, and never go on."""
    sys.stdout.write("here\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


async def main(dsn: str, step: str) -> None:
    """Reconcile with repair until the step."""
    engine = create_async_engine(dsn, connect_args={"server_settings": {"application_name": "doomed"}})
    world = World(engine, SqlSecondary("copy", engine), summed=False)
    stopping = Stopping(engine, world.manager.tracking)
    stopping.step = step
    world.source = stopping
    await world.reconcile(repair=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
