"""Rebuild: fill a secondary anew beside what it holds, prove the new one, and let it take the old one's place."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import timedelta

from sqlalchemy import text

from outbox.errors import SettingsError, Unavailable, UnknownSecondary
from outbox.level import begun
from outbox.register import Registration
from outbox.roster import Addition, Roster, Tell
from outbox.secondaries.base import Fresh, Rebuildable
from outbox.statement import Statement

__all__ = ["IN_HAND", "KEEP_TURN", "Rebuilder"]

# The row that every claim locks first: while it is locked, nobody claims for this secondary.
KEEP_TURN = Statement("""
select backend_id from {schema}.outbox_secondary where backend_id = :backend_id for no key update
""")

IN_HAND = Statement("""
select count(*) from {schema}.outbox_attempt as attempt
where attempt.backend_id = :backend_id and attempt.finished_at is null
""")

_TRIES = 5
_LONGEST_STILL = timedelta(seconds=20)
_BETWEEN_LOOKS = 0.02


class Rebuilder(Roster):
    """Rebuilds secondaries that can be filled beside what they hold."""

    async def rebuild(self, backend_id: str, *, tell: Tell = lambda _: None) -> Addition:
        """Fill a live secondary anew, beside what it holds, and switch to that once it equals the primary.

        The new one is a shadow named `<backend_id>-next`, and is added as any other; live events go to both. The switch
        happens at a moment at which the old one has nothing in hand and the new one has all that was recorded: no
        reader sees less than before. Then the new one is drained and removed, and what the old one held is deleted.
        Only the tracked types are rebuilt. Cut off and called again, it goes on where it was.

        Raises `SettingsError` for one that cannot be filled so, or without a tracked class, `UnknownSecondary` for one
        that is not live, and `Unavailable` when its server is, or when no moment for the switch is found.
        """
        registration = self._registration(backend_id)
        if not isinstance(registration.secondary, Rebuildable):
            raise SettingsError("secondary", f"{backend_id} cannot be rebuilt beside itself; add another, remove this")
        types = sorted(each.resource_type for each in self.tracking)
        if not types:
            raise SettingsError("tracking", "rebuild needs a tracked class to fill from")
        if (await self._standing(backend_id)).status != "live":
            raise UnknownSecondary(backend_id, "the registry has no such secondary that is live")
        fresh = await registration.secondary.fresh(f"{backend_id}-next")
        beside = replace(registration, secondary=fresh, shadow=True)
        # Backfill and reconcile find it by its name; nobody else is to carry to it or wait for it.
        self.registrations.append(beside)
        try:
            return await self._rebuild(registration, beside, fresh, types, tell)
        finally:
            self.registrations.remove(beside)

    async def _rebuild(
        self, registration: Registration, beside: Registration, fresh: Fresh, types: list[str], tell: Tell
    ) -> Addition:
        backend_id = registration.backend_id
        if not await fresh.switched():
            await self._join(beside, tell)
            proof, dead = await self._fill(beside, tell)
            if not proof.in_sync or dead or not await self._switch(backend_id, beside, fresh, types, tell):
                return Addition(fresh.backend_id, "shadow", proof, dead)
        await self._retire(beside, tell)
        await fresh.drop_old()
        tell(f"what {backend_id} held before is deleted")
        proof = await self.reconcile(backend_id, actor="outbox rebuild")
        return Addition(backend_id, (await self._standing(backend_id)).status, proof)

    async def _switch(self, backend_id: str, beside: Registration, fresh: Fresh, types: list[str], tell: Tell) -> bool:
        """Switch at a quiet moment; False if something is dead that the new one would lack."""
        async with self._carrying(beside):
            for _ in range(_TRIES):
                with suppress(TimeoutError):
                    async with asyncio.timeout(_LONGEST_STILL.total_seconds()), self._nothing_in_hand(backend_id):
                        if await self.drained(fresh.backend_id):
                            return False
                        await fresh.switch(types)
                        tell(f"{backend_id} leads to what was filled")
                        return True
                tell(f"{backend_id} has something in hand all the time; trying again")
        raise Unavailable("busy", f"no moment was found at which nothing is on its way to {backend_id}")

    @asynccontextmanager
    async def _nothing_in_hand(self, backend_id: str) -> AsyncIterator[None]:
        """Keep everybody from claiming for a secondary, once what is in hand is settled."""
        schema, which = self.config.database_schema, {"backend_id": backend_id}
        # A snapshot for each look.
        async with begun(self.engine, "READ COMMITTED") as keeping:
            await keeping.execute(text(KEEP_TURN.on(schema)), which)
            in_hand = True
            while in_hand:
                in_hand = bool(await keeping.scalar(text(IN_HAND.on(schema)), which))
                await asyncio.sleep(_BETWEEN_LOOKS)
            yield

    async def _retire(self, beside: Registration, tell: Tell) -> None:
        """Let the new one have what it is owed, and go: from now on the old name's deliveries reach what it holds."""
        backend_id = beside.backend_id
        if (await self._standing(backend_id)).status == "removed":
            return
        await self.drain(backend_id)
        async with self._carrying(beside):
            await self.drained(backend_id, tell=tell)
        # What is dead by now is owed to the old name as well.
        await self.remove(backend_id, discard=True, reason="a rebuild ended")
