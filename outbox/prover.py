"""Prover: what a manager does to show that secondaries equal the primary, and to make them equal."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.ahead import Moved, move_past
from outbox.answer import SyncResult, SyncStatus
from outbox.backfill import MOST_OWED, SHARE, Backfill, BackfillProgress
from outbox.capture import Tracking
from outbox.doctor import diagnose
from outbox.errors import UnknownSecondary
from outbox.find import Asked
from outbox.finding import Case, Finding
from outbox.forget import Eraser, Evidence
from outbox.reconcile import SyncReconciler
from outbox.reconciliation import ReconciliationResult, Terms
from outbox.register import Registration
from outbox.secondaries.base import Secondary
from outbox.settings import SyncConfig
from outbox.source import Source
from outbox.story import Story
from outbox.token import SyncToken
from outbox.why import StoryTeller

__all__ = ["Prover"]


class Prover:
    """Compares, repairs and fills, on the primary behind `engine`. The front door is one."""

    engine: AsyncEngine
    config: SyncConfig
    registrations: list[Registration]
    tracking: Tracking

    def ring(self) -> None:
        """Tell the relays that something is due."""
        raise NotImplementedError

    async def sync(
        self,
        what: SyncToken,
        *,
        backends: Collection[str] | None = None,
        timeout: timedelta | float | None = None,
    ) -> list[SyncStatus]:
        """Carry what a token names to secondaries of this process, and wait."""
        raise NotImplementedError

    async def wait_for_sync(
        self,
        token: SyncToken,
        *,
        timeout: timedelta | float | None = None,
        backends: Collection[str] | None = None,
    ) -> SyncResult:
        """Wait for secondaries to have what a token names."""
        raise NotImplementedError

    async def reconcile(
        self,
        backend_id: str,
        *,
        tenant_id: str | None = None,
        resource_type: str | None = None,
        repair: bool = False,
        patience: timedelta = timedelta(seconds=30),
        most_deletes: float = 0.05,
        most_deleted: int = 10_000,
        actor: str = "",
        reason: str = "",
    ) -> ReconciliationResult:
        """Compare a secondary with the tracked classes; with `repair`, record events that restore it.

        `patience` is how long deliveries under way are waited for before what they carry is left out as in flight.
        Extras are deleted only while they are no more than `most_deletes` of what the secondary holds, and
        `most_deleted` in all. `actor` and `reason` are written down. Raises what `SyncReconciler.reconcile` does.
        """
        source = Source(self.engine, self.tracking)
        terms = Terms(
            patience=patience, most_deletes=most_deletes, most_deleted=most_deleted, actor=actor, reason=reason
        )
        schema, secondary = self.config.database_schema, self._secondary(backend_id)
        reconciler = SyncReconciler(self.engine, source, secondary, schema, terms)
        result = await reconciler.reconcile(tenant_id, resource_type, repair=repair)
        if result.repaired:
            self.ring()
        return result

    async def why(self, resource_type: str, resource_id: str, tenant_id: str = "default") -> Story:
        """Return the story of one resource: what each side holds, what is owed, every attempt, and what it waits for.

        The primary's side is one snapshot. Reads all kept events once, as they have no index by key, and the latest
        20,000 attempts of each secondary.
        """
        secondaries = {each.backend_id: each.secondary for each in self.registrations}
        teller = StoryTeller(self.engine, self.config, self.tracking, secondaries)
        return await teller.tell(Asked(tenant_id, resource_type, resource_id))

    async def forget(
        self,
        resource_type: str,
        resource_id: str,
        tenant_id: str = "default",
        *,
        reason: str | None = None,
        dry_run: bool = False,
        timeout: timedelta = timedelta(seconds=30),
    ) -> Evidence:
        """Erase one resource everywhere but in the primary's own tables; return what was seen to be gone.

        Delete the primary's row first. `reason` travels with the delete, and the next call takes it out. `timeout` is
        how long open transactions, and then deliveries, are waited for. Raises `NotForgotten`, with nothing changed,
        while the primary has the resource; whatever cannot be proved is named in the evidence. May be called again.
        """
        secondaries = {each.backend_id: each.secondary for each in self.registrations}
        schema = self.config.database_schema
        eraser = Eraser(self.engine, schema, self.tracking, secondaries, self._carried, timeout)
        asked = Asked(tenant_id, resource_type, resource_id)
        return await (eraser.preview(asked, reason) if dry_run else eraser.forget(asked, reason))

    async def _carried(self, token: SyncToken, within: timedelta) -> Sequence[SyncStatus]:
        """Wait for all who are owed something, with a hand for those that this process can carry to."""
        self.ring()
        ours = {each.backend_id for each in self.registrations} & {*token.backend_ids}
        lent = await self.sync(token, backends=ours, timeout=within)
        others = {*token.backend_ids} - ours
        waited = await self.wait_for_sync(token, backends=others, timeout=within)
        return [*(each for each in lent if each.backend_id in ours), *waited]

    async def backfill(
        self,
        backend_id: str,
        *,
        tenant_id: str | None = None,
        resource_type: str | None = None,
        rate: float | None = None,
        most_owed: int | None = MOST_OWED,
        share: float = SHARE,
        restart: bool = False,
        dry_run: bool = False,
        progress: Callable[[BackfillProgress], None] = lambda _: None,
    ) -> BackfillProgress:
        """Record an event, owed to one secondary only, for every resource of the tracked classes that it wants.

        Writes may go on. Goes on where an earlier call ended, however it ended, until all is recorded once; `restart`
        begins anew, `dry_run` only counts. Records at most `rate` resources per second, for a `share` of the time, and
        no more before all but `most_owed` of its deliveries are done or failing: None is for when no relay runs.
        `progress` is called after every page. Raises `UnknownSecondary` for one that is owed nothing, and
        `SettingsError`.
        """
        backfill = Backfill(
            self.engine,
            self.tracking,
            self.config.database_schema,
            backend_id,
            rate=rate,
            most_owed=most_owed,
            share=share,
            ring=self.ring,
            told=progress,
        )
        work = backfill.plan if dry_run else backfill.run
        return await work(tenant_id, resource_type, restart=restart)

    async def diagnose(self) -> list[Finding]:
        """Look at the primary, the tables and every secondary; return what was found and what to do next.

        Never raises for what it finds; what hangs is unknown after `health_timeout`.
        """
        return await diagnose(Case(self.engine, self.config, self.registrations))

    async def move_past(self) -> Moved:
        """After history went back: let new positions be above all that any secondary holds. Never lowers them.

        Then reconcile each with `repair`: what it holds of the history that is gone is not known before. Needs the
        owner of the tables. Raises `SecondaryError` for a position that is too far to be true.
        """
        moved = await move_past(self.engine, self.config, self.registrations)
        self.ring()
        return moved

    def _secondary(self, backend_id: str) -> Secondary:
        for each in self.registrations:
            if each.backend_id == backend_id:
                return each.secondary
        raise UnknownSecondary(backend_id, "this manager does not have it")
