"""Proof: a relay compares its secondaries with the primary again and again, slowly, so that status can say since when.

It finds and tells; it repairs nothing. One relay at a time does it for a secondary: whoever writes that it begins.
Where it stands is written down too, so that the next relay goes on there, however often relays are restarted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import msgspec
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.capture import Tracking
from outbox.errors import Unavailable
from outbox.primary import code_of
from outbox.reconcile import SyncReconciler
from outbox.reconciliation import ReconciliationResult, Standing, Terms
from outbox.register import Registration
from outbox.settings import SyncConfig
from outbox.source import Source
from outbox.statement import Statement

__all__ = ["BEGIN", "STAND", "Proof"]

_log = logging.getLogger("outbox.proof")

# Due is what came to its end an interval ago, or before history may have gone back, and what nobody has gone on with
# for a while: its relay is gone.
BEGIN = Statement("""
update {schema}.outbox_secondary
set proof_at = statement_timestamp()
where backend_id = :backend_id and status = 'live'
  and (coalesce(proof_at, registered_at) <= statement_timestamp()
           - case when proof_standing is null then cast(:every as interval) else cast(:patience as interval) end
       or proof_standing is null and coalesce(proof_at, registered_at) <= doubted_at)
returning coalesce(cast(proof_standing as text), '') as standing
""")

STAND = Statement("""
update {schema}.outbox_secondary
set proof_at = statement_timestamp(), proof_standing = cast(cast(:standing as text) as json)
where backend_id = :backend_id
""")

# Longer than anybody pauses between two pages, and waits for what is under way.
_PATIENCE = timedelta(minutes=10)
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
                    await self.prove_if_due(each)

    async def prove(self, registration: Registration, standing: Standing | None = None) -> ReconciliationResult:
        """Compare one secondary now, at the pace of the background.

        Raises what `SyncReconciler.reconcile` raises, and `TimeoutError` when a page is not done by the time at which
        another relay would go on with it.
        """
        self._resumed_at = time.monotonic()
        schema, secondary = self._config.database_schema, registration.secondary
        async with asyncio.timeout(_PATIENCE.total_seconds()) as limit:
            pause, told = partial(self._pause, limit), partial(self._stand, registration.backend_id)
            reconciler = SyncReconciler(self._engine, self._source, secondary, schema, _TERMS, pause, told)
            found = await reconciler.reconcile(standing=standing)
            await self._stand(registration.backend_id, None)
        return found

    async def prove_if_due(self, registration: Registration) -> None:
        """Compare one secondary if it is due and nobody else does; whatever is in the way is told, and comes again."""
        # In a task of its own what an adapter raises, a cancellation or a panic too, is no cancellation of ours.
        [failed] = await asyncio.gather(self._prove_if_due(registration), return_exceptions=True)
        if failed is not None:
            self._tell_failure(registration.backend_id, failed)

    async def _prove_if_due(self, registration: Registration) -> None:
        standing = await self._begin(registration.backend_id)
        if standing is not None:
            self._tell(await self.prove(registration, _parsed(standing)))

    def _tell(self, found: ReconciliationResult) -> None:
        level = logging.INFO if found.in_sync else logging.WARNING
        words = "%s: compared %d resources: %d missing, %d extra, %d stale, %d altered"
        counts = (found.primary_count, found.missing, found.extra, found.stale, found.altered)
        _log.log(level, words, found.backend_id, *counts, extra={"outbox_backend_id": found.backend_id})

    def _tell_failure(self, backend_id: str, error: BaseException) -> None:
        """Tell what an error is, and neither its text nor its traceback's values, which may quote content."""
        fields = {"outbox_backend_id": backend_id}
        if isinstance(error, Unavailable):
            _log.info("%s: not compared, as it is unavailable (%s)", backend_id, error.code, extra=fields)
        else:
            _log.warning("%s: comparing failed (%s)", backend_id, code_of(error), extra=fields)

    async def _begin(self, backend_id: str) -> str | None:
        """Return where to go on, as text, empty for the beginning; None when it is not due."""
        parameters = {"backend_id": backend_id, "every": self._config.proof_interval, "patience": _PATIENCE}
        async with asyncio.timeout(_PATIENCE.total_seconds()), self._engine.begin() as connection:
            found: str | None = await connection.scalar(text(BEGIN.on(self._config.database_schema)), parameters)
        return found

    async def _stand(self, backend_id: str, standing: Standing | None) -> None:
        written = None if standing is None else msgspec.json.encode(standing).decode()
        async with self._engine.begin() as connection:
            parameters = {"backend_id": backend_id, "standing": written}
            await connection.execute(text(STAND.on(self._config.database_schema)), parameters)

    async def _pause(self, limit: asyncio.Timeout) -> None:
        """Rest as long as keeps the work within its share; then there is as much time for the next page."""
        rest = (time.monotonic() - self._resumed_at) * (1 / self._config.proof_share - 1)
        limit.reschedule(asyncio.get_running_loop().time() + rest + _PATIENCE.total_seconds())
        await asyncio.sleep(rest)
        self._resumed_at = time.monotonic()


def _parsed(standing: str) -> Standing | None:
    """Return where to go on; what another version wrote is begun anew."""
    try:
        return msgspec.json.decode(standing, type=Standing) if standing else None
    except msgspec.MsgspecError:
        return None
