"""Level: work at the isolation level that a statement needs, whatever the caller's engine has."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["begun", "connected"]


@asynccontextmanager
async def connected(engine: AsyncEngine, level: str) -> AsyncIterator[AsyncConnection]:
    """Lend a connection at a level; the pool gets it back at its own.

    Said on the connection: an engine with options gives way to those of the engine that it was made from.
    """
    async with engine.connect() as connection:
        yield await connection.execution_options(isolation_level=level)


@asynccontextmanager
async def begun(engine: AsyncEngine, level: str) -> AsyncIterator[AsyncConnection]:
    """Lend a connection within a transaction at a level, and commit it."""
    async with connected(engine, level) as connection, connection.begin():
        yield connection
