"""SyncManager: the front door. Everything a user constructs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox.answer import SyncResult, SyncState, SyncStatus
from outbox.bulk import BulkStatus, bulk_statuses, record_bulk
from outbox.capture import Tracking
from outbox.errors import SettingsError, UnknownSecondary
from outbox.event import StoredResource, SyncEvent
from outbox.follow import Follower
from outbox.health import Checkup, Health, Roll
from outbox.metrics import exposition
from outbox.operate import Operator
from outbox.proof import Proof
from outbox.rebuild import Rebuilder
from outbox.record import record
from outbox.register import Registration, check_together, register
from outbox.relay import Relay
from outbox.retry import RetryPolicy
from outbox.secondaries.base import Closeable, Secondary
from outbox.session import OutboxSession, SyncOutboxSession
from outbox.settings import SyncConfig, SyncMode
from outbox.shadows import Shadows
from outbox.status import BackendSyncStatus, Failure, failures, statuses
from outbox.token import SyncToken
from outbox.waiters import Waiters
from outbox.wakeup import Doorbell

__all__ = ["SyncManager"]

_BETWEEN_LOOKS = 0.02
_LONGEST_WAIT = 86_400


class SyncManager(Operator, Rebuilder):
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
        names = [each.backend_id for each in self.registrations]
        check_together(self.registrations, self.config)
        self._waiters = Waiters(engine, self.config.database_schema)
        self._follower = Follower(self.registrations, self.config, self._own_relay, self._waiters)
        self._shadows = Shadows(engine, self.config.database_schema)
        self._roll = Roll()
        self._checkup = Checkup(engine, self.config, names, self._roll)

    def track(self, entity: type[Any], **mapping: Any) -> None:
        """Record the changes of a mapped class and its subclasses at every flush of our sessions.

        Keywords, each a function of the object unless said otherwise: `resource_type` (text; default the class's name),
        `tenant` (function, column or text; "default"), `resource_id` (function or column; the primary key), `content`
        (a dict or JSON text; the mapped columns), `version` (none), `fhir_version` (text; none), `limits`. Columns
        (`tenant=Patient.tenant_id`) let reconcile filter and page in the database.
        """
        self.tracking.track(entity, **mapping)

    def session(self, **options: Any) -> OutboxSession:
        """Return an `AsyncSession` on the primary that records events in its transactions.

        `correlation_id`, `actor`, `traceparent` (text) and `headers` (a mapping) are carried by all of its events; the
        rest is SQLAlchemy's.
        """
        return OutboxSession(self.engine, **self._session_options(self.engine), **options)

    def sync_session(self, engine: Engine, **options: Any) -> SyncOutboxSession:
        """Return a `Session` on a synchronous engine of the same primary. Takes what `session` takes."""
        return SyncOutboxSession(engine, **self._session_options(engine), **options)

    async def sync(
        self,
        what: SyncEvent | Iterable[SyncEvent] | SyncToken | str,
        *,
        mode: SyncMode | None = None,
        backends: Collection[str] | None = None,
        timeout: timedelta | float | None = None,
    ) -> list[SyncStatus]:
        """Record events in a transaction of their own, then wait for secondaries as the mode says.

        Given a token instead, what it names was recorded and committed before. Waits for `backends` if they are named,
        else as `mode`, the registration or the settings say, for at most `timeout` (seconds; `sync_timeout`); never for
        a shadow that is not named. Returns a status for every secondary that is owed something or was named; what is
        not there in time is accepted and on its way, never failed. Raises before any SQL for a name that this manager
        does not have.
        """
        waited_for = await self._waited_for(mode) if backends is None else {*backends}
        for name in waited_for:
            self._secondary(name)
        within = _duration(timeout, self.config.sync_timeout)
        token = SyncToken(what) if isinstance(what, str) else await self._record(what)
        return await self._follower.follow(token, waited_for & {*token.backend_ids, *(backends or ())}, within)

    async def sync_bulk(
        self,
        resources: Iterable[StoredResource] | AsyncIterable[StoredResource],
        *,
        tenant_id: str = "default",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[UUID, SyncToken]:
        """Record one event for each resource, all in one transaction of their own, in bounded memory.

        A tombstone becomes a delete. Returns the bulk's id, for `bulk_status`, and its token, for `sync` or
        `wait_for_sync`. Raises `InvalidEvent`, with nothing written, when a resource is invalid or of another tenant.
        """
        bulk_id = uuid4()
        async with self.engine.begin() as connection:
            token = await record_bulk(
                connection,
                self.config.database_schema,
                resources,
                tenant_id=tenant_id,
                bulk_id=bulk_id,
                headers=headers,
            )
        self.ring()
        return bulk_id, token

    async def bulk_status(self, bulk_id: UUID, most: int = 100) -> list[BulkStatus]:
        """Return what became of a bulk on every secondary, with up to `most` of the resources that failed."""
        return await bulk_statuses(self.engine, self.config.database_schema, bulk_id, most)

    async def wait_for_sync(
        self,
        token: SyncToken | str,
        *,
        timeout: timedelta | float | None = None,
        backends: Collection[str] | None = None,
        visible: bool = False,
    ) -> SyncResult:
        """Wait until secondaries have what a transaction recorded; the result is true only when all of them do.

        `token` may come from any process. Waits at most `timeout` (seconds; `sync_timeout`; zero: looks once) for
        `backends` (all that are owed something, but shadows). Ends at once when waiting cannot help: dead, paused,
        removed, rolled back, uncommitted, pruned, unknown. With `visible` also refreshes the secondary, so that
        searches see it. Raises `InvalidToken`, and `UnknownSecondary` for a name that neither the token nor this
        manager has.
        """
        token, within = SyncToken(token), _duration(timeout, self.config.sync_timeout)
        names = await self._relied_on(token) if backends is None else sorted({*backends})
        for name in {*names} - {*token.backend_ids}:
            self._secondary(name)
        waiting = (self._waited(name, token, within, visible=visible) for name in names)
        return SyncResult(tuple(await asyncio.gather(*waiting)))

    async def may_read(
        self, backend_id: str, token: SyncToken | str | None = None, *, max_lag: timedelta | float | None = None
    ) -> bool:
        """Whether a reader may use this secondary; when not, the primary has the answer.

        Never one that is a shadow, draining or removed: it misses more than it is owed.

        Waits up to `max_lag` (seconds; `max_read_lag`): with a token for what it names, else for the lag to be no more.
        """
        limit = _duration(max_lag, self.config.max_read_lag)
        if token is not None:
            status = (await self.wait_for_sync(token, timeout=limit, backends=[backend_id]))[backend_id]
            enough = status.synced or status.state is SyncState.NOT_OWED
            return enough and await self._shadows.readable(backend_id)
        asked = time.monotonic()
        until = asked + limit.total_seconds()
        while (await self.backend_status(backend_id)).lag > limit:
            if (now := time.monotonic()) >= until:
                return False
            # What costs more, because much is owed, is asked less often.
            await asyncio.sleep(min(max(_BETWEEN_LOOKS, 10 * (now - asked)), until - now))
            asked = time.monotonic()
        return await self._shadows.readable(backend_id)

    async def register(self) -> None:
        """Write the secondaries to the registry: from here on every new event is owed to them.

        One that was removed comes back as a shadow: it missed events. `add` fills it.
        """
        async with self.engine.begin() as connection:
            await connection.run_sync(register, self.config.database_schema, self.registrations)

    def relay(self) -> Relay:
        """Return a relay for all secondaries of this manager."""
        proof = None
        if self.config.proof_interval is not None:
            proof = Proof(self.engine, self.registrations, self.config, self.tracking)
        return Relay(self.engine, self.registrations, self.config, self._policy, self._doorbell, self._roll, proof)

    def _relay_of(self, registrations: Sequence[Registration]) -> Relay:
        """One for some of them only, which this process is not asked about."""
        return Relay(self.engine, registrations, self.config, self._policy, self._doorbell)

    async def all_statuses(self) -> list[BackendSyncStatus]:
        """Return every registered secondary by name, exact and in one snapshot."""
        return await statuses(self.engine, self.config)

    async def backend_status(self, backend_id: str) -> BackendSyncStatus:
        """Return one secondary. Raises `UnknownSecondary` when the registry does not have it."""
        for status in await self.all_statuses():
            if status.backend_id == backend_id:
                return status
        raise UnknownSecondary(backend_id, "the registry does not have it; a relay or register() puts it there")

    async def metrics(self) -> bytes:
        """Return `all_statuses` as Prometheus reads them, of `outbox.metrics.CONTENT_TYPE`. Needs `[metrics]`."""
        return exposition(await self.all_statuses())

    async def health(self) -> Health:
        """Return how this process, its primary and every secondary are, with reasons.

        Never raises for a primary that is away, and answers within `health_timeout`.
        """
        return await self._checkup.look()

    async def is_healthy(self) -> bool:
        """Whether `health` finds nothing wrong."""
        return (await self.health()).ok

    async def failures(self, backend_id: str | None = None, most: int = 100) -> list[Failure]:
        """Return up to `most` failing and dead keys with their errors, dead ones first."""
        return await failures(self.engine, self.config.database_schema, backend_id, most)

    def ring(self) -> None:
        """Tell the relays that events were committed; only needed after `record` on a raw connection."""
        self._doorbell.ring(self.engine)

    async def aclose(self) -> None:
        """Close the secondaries, once what is in hand is done or handed back; the engine stays the caller's."""
        await self._follower.aclose()
        await self._waiters.aclose()
        await self._doorbell.aclose()
        for each in self.registrations:
            if isinstance(each.secondary, Closeable):
                await each.secondary.aclose()

    async def _waited(self, backend_id: str, token: SyncToken, within: timedelta, *, visible: bool) -> SyncStatus:
        status = await self._waiters.wait(backend_id, token, within)
        return await self._follower.show(status, within - status.duration) if visible else status

    async def _record(self, events: SyncEvent | Iterable[SyncEvent]) -> SyncToken:
        async with self.engine.begin() as connection:
            token = await record(connection, events, schema=self.config.database_schema)
        self.ring()
        return token

    def _own_relay(self) -> Relay:
        """The one whose hands callers use: it claims nothing but what they wait for."""
        return self._relay_of(self.registrations)

    async def _waited_for(self, mode: SyncMode | None) -> set[str]:
        asked = self._follower.waited_for(mode)
        return asked - await self._shadows.names() if asked else asked

    async def _relied_on(self, token: SyncToken) -> list[str]:
        shadows = await self._shadows.names()
        return [name for name in token.backend_ids if name not in shadows]

    def _session_options(self, engine: AsyncEngine | Engine) -> dict[str, Any]:
        ring: Callable[[], None] = lambda: self._doorbell.ring(engine)  # noqa: E731 - a closure over one engine
        return {"tracking": self.tracking, "ring": ring, "schema": self.config.database_schema}


def _duration(given: timedelta | float | None, default: timedelta) -> timedelta:
    if given is None:
        return default
    seconds = given.total_seconds() if isinstance(given, timedelta) else given
    if not 0 <= seconds <= _LONGEST_WAIT:
        raise SettingsError("timeout", f"must be between 0 and {_LONGEST_WAIT} seconds")
    return timedelta(seconds=seconds)
