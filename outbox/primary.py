"""Primary: the relay's own connections, their pinned plans, and coming back after the primary went away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from typing import Any, cast

import asyncpg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_exponential_jitter

from outbox.errors import SettingsError
from outbox.settings import SyncConfig

__all__ = ["PRIMARY_FAILED", "Primary", "code_of"]

_log = logging.getLogger("outbox.primary")

PRIMARY_FAILED = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    SQLAlchemyError,
    OSError,
    TimeoutError,
)
"""What talking to the primary may raise; everything else is a defect and is not retried."""

_SHORTEST_PAUSE = 0.002
_ANSWERS_WITHIN = 5.0

# The claim's plan must not depend on statistics: what was planned while the tables were empty is what a cached
# plan would stay with. Every access is by an index that exists for it.
_PINNED = {
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "timezone": "UTC",
    "application_name": "outbox relay",
    "default_transaction_isolation": "read committed",
}

_ARRAYS = "select $1::smallint[], $2::integer[], $3::bigint[], $4::float8[], $5::boolean[], $6::timestamptz[]"


class Primary:
    """A small pool made through the application's engine, so its addresses, TLS and credentials apply here too."""

    def __init__(self, engine: AsyncEngine, config: SyncConfig) -> None:
        if engine.dialect.driver != "asyncpg":
            raise SettingsError("engine", f"a relay needs a postgresql+asyncpg engine, not {engine.dialect.driver}")
        self._engine = engine
        self._config = config
        self._pool: asyncpg.Pool[asyncpg.Record] | None = None
        self.connected = 0
        """How often a connection was made: between two of them the primary may have crashed without a statement of
        ours failing."""

    async def open(self) -> None:
        """Create the pool; its connections are made when first needed."""
        self._pool = await asyncpg.create_pool(
            min_size=0,
            max_size=self._config.relay_connections,
            # With every new connection floors are forgotten.
            max_queries=2**31,
            connect=self._connect,
            init=self.pin,
            reset=_nothing,
        )

    async def close(self) -> None:
        """Close the pool, waiting a moment for statements under way."""
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        try:
            await asyncio.wait_for(pool.close(), timeout=5)
        except PRIMARY_FAILED:
            pool.terminate()

    @asynccontextmanager
    async def connection(self, within: float | None = None) -> AsyncIterator[asyncpg.Connection[Any]]:
        """Lend a connection of the pool for one statement or one short transaction.

        After `within` seconds, by default twice what the server allows a statement, it is ended under whoever has it.
        """
        assert self._pool is not None, "open the primary first"
        pool, lent = self._pool, await self._pool.acquire()
        connection = cast("asyncpg.Connection[Any]", lent)
        with _ended_after(within or 2 * self._config.statement_timeout.total_seconds(), connection):
            try:
                yield connection
            except asyncpg.InternalClientError:
                # The driver lost track of a session that was cut off; nobody must get it again.
                connection.terminate()
                raise
            finally:
                await pool.release(lent)

    async def reserved(self) -> asyncpg.Connection[Any]:
        """Return a connection of its own, outside the pool; the caller closes it."""
        connection = await self._connect()
        await self.pin(connection)
        return connection

    async def pin(self, connection: asyncpg.Connection[Any]) -> None:
        """Pin the plans, and bound how long anything may take or sit on a lock; a connection where that fails is ended.

        It may have lain idle in the application's pool, and nobody knows whether anyone is still at its other end.
        """
        with _ended_after(_ANSWERS_WITHIN, connection), ExitStack() as undo:
            # Whoever is stopped in here has no hand on it to close it.
            undo.callback(connection.terminate)
            names, values = zip(*self._settings().items(), strict=True)
            await connection.execute(
                "select set_config(name, value, false) from unnest($1::text[], $2::text[]) as setting (name, value) "
                "where current_setting(name, true) is not null",
                names,
                values,
            )
            # The driver asks the catalog about a kind of array when it first meets it: now, not in somebody's turn.
            await connection.prepare(_ARRAYS)
            undo.pop_all()

    def _settings(self) -> dict[str, str]:
        limit = _milliseconds(self._config.statement_timeout)
        # A relay that is paused inside a claim must not keep the secondary's registry row for longer than its work.
        turn = _milliseconds(min(self._config.statement_timeout, self._config.lease))
        return _PINNED | {
            "statement_timeout": limit,
            "lock_timeout": limit,
            "idle_in_transaction_session_timeout": turn,
            # Since PostgreSQL 17; before, a relay paused while it prepares a claim keeps the row for `limit`.
            "transaction_timeout": turn,
        }

    async def wait(self) -> None:
        """Return once the primary answers; tries for ever, with jittered backoff up to 10 s."""
        retrying = AsyncRetrying(
            wait=wait_exponential_jitter(multiplier=0.1, max=10),
            retry=retry_if_exception_type(PRIMARY_FAILED),
            before_sleep=_log_wait,
        )
        await retrying(self._answers)

    async def recover(self, failures: int) -> None:
        """Wait for the primary, and longer from failure to failure: what can never work must not be tried in a spin."""
        await asyncio.sleep(_SHORTEST_PAUSE * 4 ** min(failures, 7) / 4)
        await self.wait()

    async def _answers(self) -> None:
        async with asyncio.timeout(2 * _ANSWERS_WITHIN), self.connection(_ANSWERS_WITHIN) as connection:
            await connection.fetchval("select 1")

    async def _connect(self, *_: Any, **__: Any) -> asyncpg.Connection[Any]:
        try:
            # A pool that first asks whether a connection is alive may wait for the answer for ever.
            async with asyncio.timeout(2 * _ANSWERS_WITHIN):
                raw = await self._engine.raw_connection()
        except self._engine.dialect.loaded_dbapi.Error as error:
            # A raw connection's errors are the adapter's; what the driver said is behind them.
            cause = error.__cause__
            raise cause if isinstance(cause, PRIMARY_FAILED) else ConnectionError(type(error).__name__) from None
        self.connected += 1
        driver = cast("asyncpg.Connection[Any]", raw.driver_connection)
        # Ours from now on: the application's pool gets its place back.
        raw.detach()
        return driver


def code_of(error: BaseException | None) -> str:
    """Return what an error is, without its text: a driver's text may quote values."""
    return getattr(error, "sqlstate", None) or type(error).__name__


@contextmanager
def _ended_after(seconds: float, connection: asyncpg.Connection[Any]) -> Iterator[None]:
    """End a connection that is busy for so long: a network may swallow everything and say so to neither side.

    Cancelling would not do, as the driver then waits until the server says that it stopped.
    """
    ending = asyncio.get_running_loop().call_later(seconds, connection.terminate)
    try:
        yield
    finally:
        ending.cancel()


def _milliseconds(duration: timedelta) -> str:
    return str(max(1, duration // timedelta(milliseconds=1)))


async def _nothing(_: asyncpg.Connection[Any]) -> None:
    """A relay's connection carries no state worth a round trip to reset."""


def _log_wait(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    wait = state.next_action.sleep if state.next_action else 0.0
    _log.warning("the primary does not answer (%s); trying again in %.1f s", code_of(error), wait)
