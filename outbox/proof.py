"""Proof: a relay compares its secondaries with the primary again and again, slowly, so that status can say since when.

It finds and tells; it repairs nothing. One relay at a time does it for a secondary: whoever writes that it begins.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.capture import Tracking
from outbox.errors import OutboxError, Unavailable
from outbox.primary import PRIMARY_FAILED, code_of
from outbox.reconcile import ReconciliationResult, SyncReconciler, Terms
from outbox.register import Registration
from outbox.settings import SyncConfig
from outbox.source import Source
from outbox.statement import Statement

__all__ = ["BEGIN", "Proof"]

_log = logging.getLogger("outbox.proof")

# A relay that dies in the middle has begun; the next comparison is due an interval later.
BEGIN = Statement("""
update {schema}.outbox_secondary
set proof_begun_at = statement_timestamp()
where backend_id = :backend_id and status = 'live'
  and coalesce(proof_begun_at, registered_at) <= statement_timestamp() - cast(:every as interval)
returning backend_id
""")

_TERMS = Terms(actor="relay", reason="continuous proof")


class Proof:
    """Compares secondaries in the background, for one relay, within `proof_share` of the time."""

    def __init__(
        self, engine: AsyncEngine, registrations: Sequence[Registration], config: SyncConfig, tracking: Tracking
    ) -> None:
        self._engine = engine
        self._registrations = registrations
        self._config = config
        self._source = Source(engine, tracking)
        self._resumed_at = 0.0

    async def run(self) -> None:
        """Compare whatever is due, for ever; without tracked classes there is nothing to compare."""
        every = self._config.proof_interval
        assert every is not None, "whoever wants no proof makes none"
        while True:
            # Often enough to take over from a relay that is gone, and no load to speak of.
            await asyncio.sleep(min(every.total_seconds() / 10, 60))
            if self._source.resource_types:
                for each in self._registrations:
                    await self._prove_if_due(each)

    async def prove(self, registration: Registration) -> ReconciliationResult:
        """Compare one secondary now, at the pace of the background. Raises what `SyncReconciler.reconcile` raises."""
        self._resumed_at = time.monotonic()
        schema = self._config.database_schema
        reconciler = SyncReconciler(self._engine, self._source, registration.secondary, schema, _TERMS, self._pause)
        return await reconciler.reconcile()

    async def _prove_if_due(self, registration: Registration) -> None:
        backend_id = registration.backend_id
        fields: dict[str, object] = {"outbox_backend_id": backend_id}
        try:
            if not await self._begins(backend_id):
                return
            found = await self.prove(registration)
        except Unavailable as error:
            _log.info("%s: not compared, as it is unavailable (%s)", backend_id, error.code, extra=fields)
        except PRIMARY_FAILED as error:
            _log.warning("%s: comparing failed (%s)", backend_id, code_of(error), extra=fields)
        except OutboxError as error:
            _log.warning("%s: comparing failed (%s)", backend_id, type(error).__name__, extra=fields)
        else:
            self._tell(found, fields)

    def _tell(self, found: ReconciliationResult, fields: dict[str, object]) -> None:
        level = logging.INFO if found.in_sync else logging.WARNING
        words = "%s: compared %d resources: %d missing, %d extra, %d stale, %d altered"
        counts = (found.primary_count, found.missing, found.extra, found.stale, found.altered)
        _log.log(level, words, found.backend_id, *counts, extra=fields)

    async def _begins(self, backend_id: str) -> bool:
        parameters = {"backend_id": backend_id, "every": self._config.proof_interval}
        async with self._engine.begin() as connection:
            found = await connection.scalar(text(BEGIN.on(self._config.database_schema)), parameters)
        return found is not None

    async def _pause(self) -> None:
        """Rest as long as keeps the work within its share."""
        worked = time.monotonic() - self._resumed_at
        await asyncio.sleep(worked * (1 / self._config.proof_share - 1))
        self._resumed_at = time.monotonic()
