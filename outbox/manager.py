"""SyncManager: the front door. Everything a user constructs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.capture import Tracking
from outbox.errors import SettingsError, UnknownSecondary
from outbox.reconcile import ReconciliationResult, SyncReconciler
from outbox.register import Registration, register
from outbox.relay import Relay
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Closeable, Secondary
from outbox.session import OutboxSession, SyncOutboxSession
from outbox.settings import SyncConfig
from outbox.source import Source
from outbox.status import BackendSyncStatus, Failure, failures, statuses
from outbox.wakeup import Doorbell

__all__ = ["SyncManager"]


class SyncManager:
    """Keeps secondaries equal to the primary behind `engine`.

    `secondaries` are adapters, or `Registration`s where the terms differ from the defaults. `retry` replaces the policy
    that `config` describes. Nothing is connected before it is needed.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        secondaries: Sequence[Secondary | Registration] = (),
        *,
        config: SyncConfig | None = None,
        retry: RetryPolicy | None = None,
    ) -> None:
        self.engine = engine
        self.config = config or SyncConfig()
        self.registrations = [each if isinstance(each, Registration) else Registration(each) for each in secondaries]
        self.tracking = Tracking()
        self._policy = retry or RetryPolicy.from_config(self.config)
        self._doorbell = Doorbell(self.config.database_schema, across_processes=self.config.doorbell)
        self._registered = False
        _refuse_repeated([each.backend_id for each in self.registrations])

    def track(self, entity: type[Any], **mapping: Any) -> None:
        """Record the changes of a mapped class and its subclasses at every flush of our sessions.

        Keywords, each a function of the object unless said otherwise: `resource_type` (text; default the class's name),
        `tenant` (function, column or text; "default"), `resource_id` (function or column; the primary key), `content`
        (a dict or JSON text; the mapped columns), `version` (none), `fhir_version` (text; none), `limits`. Columns
        (`tenant=Patient.tenant_id`) let reconcile filter and page in the database.
        """
        self.tracking.track(entity, **mapping)

    def session(self, **options: Any) -> OutboxSession:
        """Return an `AsyncSession` on the primary that records events in its transactions."""
        return OutboxSession(self.engine, **self._session_options(self.engine), **options)

    def sync_session(self, engine: Engine, **options: Any) -> SyncOutboxSession:
        """Return a `Session` on a synchronous engine of the same primary."""
        return SyncOutboxSession(engine, **self._session_options(engine), **options)

    async def register(self) -> None:
        """Write the secondaries to the registry: from here on every new event is owed to them."""
        async with self.engine.begin() as connection:
            await connection.run_sync(register, self.config.database_schema, self.registrations)

    def relay(self) -> Relay:
        """Return a relay for all secondaries of this manager."""
        return Relay(self.engine, self.registrations, self.config, self._policy, self._doorbell)

    async def all_statuses(self) -> list[BackendSyncStatus]:
        """Return every registered secondary by name, exact and in one snapshot."""
        return await statuses(self.engine, self.config.database_schema)

    async def backend_status(self, backend_id: str) -> BackendSyncStatus:
        """Return one secondary. Raises `UnknownSecondary` when the registry does not have it."""
        for status in await self.all_statuses():
            if status.backend_id == backend_id:
                return status
        raise UnknownSecondary(backend_id, "the registry does not have it; a relay or register() puts it there")

    async def failures(self, backend_id: str | None = None, most: int = 100) -> list[Failure]:
        """Return up to `most` failing and dead keys with their errors, dead ones first."""
        return await failures(self.engine, self.config.database_schema, backend_id, most)

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

    def ring(self) -> None:
        """Tell the relays that events were committed; only needed after `record` on a raw connection."""
        self._doorbell.ring(self.engine)

    async def aclose(self) -> None:
        """Close the secondaries, once the doorbell is still; the engine stays the caller's."""
        await self._doorbell.aclose()
        for each in self.registrations:
            if isinstance(each.secondary, Closeable):
                await each.secondary.aclose()

    def _secondary(self, backend_id: str) -> Secondary:
        for each in self.registrations:
            if each.backend_id == backend_id:
                return each.secondary
        raise UnknownSecondary(backend_id, "this manager does not have it")

    def _session_options(self, engine: AsyncEngine | Engine) -> dict[str, Any]:
        ring: Callable[[], None] = lambda: self._doorbell.ring(engine)  # noqa: E731 - a closure over one engine
        return {"tracking": self.tracking, "ring": ring, "schema": self.config.database_schema}


def _refuse_repeated(names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise SettingsError("secondaries", f"{name!r} is there twice")
