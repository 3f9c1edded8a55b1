"""What every system in the comparison does: be installed, record bodies, and hand each one over once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Protocol

Body = dict[str, Any]
Take = Callable[[Body], None]


class Recorder(Protocol):
    """What an application holds that records."""

    async def one(self, body: Body) -> None:
        """Record one body, committed on return."""

    async def many(self, bodies: Sequence[Body]) -> None:
        """Record all of these in one transaction, committed on return."""


class Peer(ABC):
    """One system on an empty database. With `quick` it takes the settings that are best for latency."""

    # How often each body is handed over.
    secondaries: ClassVar[int] = 1

    def __init__(self, dsn: str, *, quick: bool) -> None:
        self.dsn = dsn
        self.quick = quick

    @abstractmethod
    async def prepare(self) -> None:
        """Make its tables."""

    @abstractmethod
    def recording(self) -> AbstractAsyncContextManager[Recorder]:
        """Lend a recorder."""

    @abstractmethod
    async def relay(self, take: Take) -> None:
        """Hand over, decoded, until cancelled."""

    @property
    def url(self) -> str:
        """The address as SQLAlchemy wants it."""
        return self.dsn.replace("postgresql://", "postgresql+asyncpg://", 1)


Lent = AsyncIterator[Recorder]
