"""Sweep: vacuum the tables of a server that crashes too often for its autovacuum ever to begin."""

from __future__ import annotations

import asyncio

import asyncpg

from outbox.schema import metadata

__all__ = ["sweep"]

_EVERY = 10.0
_PATIENCE = 5.0
# A crash in the middle of it, or before it was reached.
_CRASHED = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError)


async def sweep(dsn: str) -> None:
    """Vacuum every table of ours now and then, until cancelled.

    Statistics do not outlive a crash, and the launcher waits a minute: a soak of 1,200 crashes was never vacuumed, and
    a fifth as fast after an hour.
    """
    while True:
        for table in metadata().tables:
            try:
                connection = await asyncpg.connect(dsn, timeout=_PATIENCE)
                try:
                    await connection.execute(f"vacuum {table}")
                finally:
                    await connection.close(timeout=_PATIENCE)
            except _CRASHED:
                await asyncio.sleep(0.1)
        await asyncio.sleep(_EVERY)
