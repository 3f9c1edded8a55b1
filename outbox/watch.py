"""Watch: a connection that nothing can starve, on which a relay keeps its leases and listens for the doorbell."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import asyncpg

from outbox.carrier import Carrier
from outbox.lease import heartbeat
from outbox.primary import PRIMARY_FAILED, Primary, code_of
from outbox.schema import LISTEN_CHANNEL
from outbox.settings import SyncConfig
from outbox.wakeup import Doorbell

__all__ = ["Watch"]

_log = logging.getLogger("outbox.relay")

_BETWEEN_WATCHES = 0.1


class Watch:
    """Keeps what the carriers of one relay have in hand, and wakes them when something is written."""

    def __init__(
        self, primary: Primary, config: SyncConfig, relay_id: UUID, carriers: Sequence[Carrier], doorbell: Doorbell
    ) -> None:
        self._primary = primary
        self._config = config
        self._relay_id = relay_id
        self._carriers = carriers
        self._doorbell = doorbell

    async def run(self) -> None:
        """Watch until cancelled. Without a primary, what is in hand is given up after a lease: it may be another's."""
        unsubscribe = self._doorbell.subscribe(self._rung_from(asyncio.get_running_loop()))
        try:
            while True:
                try:
                    await self._watch_on_one_connection()
                except PRIMARY_FAILED as error:
                    _log.warning("the watching connection failed (%s)", code_of(error))
                    await self._wait_for_primary()
        finally:
            unsubscribe()

    async def _watch_on_one_connection(self) -> None:
        async with self._soon():
            connection = await self._primary.reserved()
        try:
            async with self._soon():
                await self._keep_leases(connection)
            async with self._soon():
                await self._listen(connection)
            # Whatever was rung while nobody listened is found by looking once.
            self._ring()
            while True:
                await asyncio.sleep(self._config.lease.total_seconds() / 3)
                async with self._soon():
                    await self._keep_leases(connection)
        finally:
            connection.terminate()

    def _soon(self) -> asyncio.Timeout:
        """Bound what may never be answered so that a lease can still be renewed on another connection."""
        return asyncio.timeout(self._config.lease.total_seconds() / 2)

    async def _listen(self, connection: asyncpg.Connection[Any]) -> None:
        try:
            await connection.add_listener(LISTEN_CHANNEL, self._heard)
        except asyncpg.PostgresError as error:
            # A pooler in between may not know LISTEN; heartbeats must not depend on it.
            _log.warning("no doorbell on this connection (%s); polling alone", code_of(error))

    async def _keep_leases(self, connection: asyncpg.Connection[Any]) -> None:
        await connection.fetchval("select 1")
        schema, lease = self._config.database_schema, self._config.lease
        for carrier in self._carriers:
            if mine := carrier.hands.attempt_ids:
                kept = await heartbeat(connection, schema, self._relay_id, carrier.backend_id, sorted(mine), lease)
                carrier.hands.give_up(mine - kept)

    async def _wait_for_primary(self) -> None:
        """Wait, but not with work in hand for longer than a lease: by then somebody else may have taken it over."""
        try:
            async with asyncio.timeout(self._config.lease.total_seconds()):
                await asyncio.sleep(_BETWEEN_WATCHES)
                await self._primary.wait()
        except TimeoutError:
            for carrier in self._carriers:
                carrier.hands.give_up(carrier.hands.attempt_ids)
            await self._primary.wait()

    def _heard(self, _connection: Any, _process: int, _channel: str, schema: object) -> None:
        if schema == self._config.database_schema:
            self._ring()

    def _ring(self) -> None:
        for carrier in self._carriers:
            carrier.ring()

    def _rung_from(self, loop: asyncio.AbstractEventLoop) -> Callable[[], None]:
        def ring() -> None:
            loop.call_soon_threadsafe(self._ring)

        return ring
