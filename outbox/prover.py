"""Prover: what a manager does to show that secondaries equal the primary, and to make them equal."""

from __future__ import annotations

from datetime import timedelta

from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.capture import Tracking
from outbox.errors import UnknownSecondary
from outbox.reconcile import ReconciliationResult, SyncReconciler
from outbox.register import Registration
from outbox.secondaries.base import Secondary
from outbox.settings import SyncConfig
from outbox.source import Source

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

    async def reconcile(
        self,
        backend_id: str,
        *,
        tenant_id: str | None = None,
        resource_type: str | None = None,
        repair: bool = False,
        patience: timedelta = timedelta(seconds=30),
    ) -> ReconciliationResult:
        """Compare a secondary with the tracked classes; with `repair`, record events that restore it.

        `patience` is how long deliveries under way are waited for before what they carry is left out as in flight.
        """
        source = Source(self.engine, self.tracking)
        schema, secondary = self.config.database_schema, self._secondary(backend_id)
        reconciler = SyncReconciler(self.engine, source, secondary, schema, patience=patience)
        result = await reconciler.reconcile(tenant_id, resource_type, repair=repair)
        if result.repaired:
            self.ring()
        return result

    def _secondary(self, backend_id: str) -> Secondary:
        for each in self.registrations:
            if each.backend_id == backend_id:
                return each.secondary
        raise UnknownSecondary(backend_id, "this manager does not have it")
