"""Terms: what a run is made of, as every process of it gets them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Literal

import msgspec
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from outbox.settings import SyncConfig
from outbox.testing.crash.numbers import NOTHING_ASKED, Numbers

__all__ = ["BACKENDS", "SPARED", "Terms", "config_of", "engine_of"]

#: The role whose processes live through all that strikes others; its name begins theirs.
SPARED = "survivor"

#: The secondaries of a run and the order each needs.
BACKENDS: dict[str, Literal["state", "log"]] = {"index": "state", "archive": "log"}

_MEBIBYTE = 1_048_576


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Everything random follows from `seed`, except what the operating system makes of it."""

    seed: int
    seconds: float
    relays: int
    writers: int
    faults: tuple[str, ...]
    history_file: str
    directory: str
    numbers: Numbers = NOTHING_ASKED
    survivors: int = 0
    dsn: str = ""
    hot_keys: int = 400
    keys: int = 1_200
    lease: float = 1.0

    @property
    def asked(self) -> dict[str, int]:
        """What is to be reached in that time."""
        return self.numbers.within(self.seconds)

    @property
    def prunes(self) -> bool:
        """Whether events are forgotten within seconds: every other seed, since what is kept tells more at the end."""
        return self.seed % 2 == 1

    @property
    def history(self) -> Path:
        """The file that every process tells."""
        return Path(self.history_file)

    @property
    def shelf(self) -> str:
        """The socket on which the secondaries answer."""
        return str(Path(self.directory) / "shelf")

    @property
    def log(self) -> Path:
        """What processes say for people."""
        return Path(self.directory) / "processes.log"


def config_of(terms: Terms) -> SyncConfig:
    """Return settings with times short enough for a failure to be over before the next."""
    return SyncConfig(
        lease=timedelta(seconds=terms.lease),
        attempt_deadline=timedelta(seconds=3 * terms.lease),
        poll_interval=timedelta(milliseconds=50),
        # What is lost twice goes alone: of large batches a kill would leave little that goes together.
        batch_size=25,
        batch_bytes=_MEBIBYTE,
        retry_initial=timedelta(milliseconds=20),
        retry_max=timedelta(milliseconds=500),
        breaker_initial=timedelta(milliseconds=100),
        breaker_max=timedelta(milliseconds=500),
        relay_connections=terms.numbers.connections,
        prune_interval=timedelta(seconds=1),
        keep_events=timedelta(seconds=5) if terms.prunes else timedelta(days=1),
        statement_timeout=timedelta(seconds=5),
        shutdown_grace=timedelta(seconds=2),
        proof_interval=None,
    )


def engine_of(terms: Terms, name: str, **connecting: object) -> AsyncEngine:
    """Return an engine whose connections say whose they are, so that the nemesis can tell."""
    # Whoever is born every second must not prepare for TLS first, which takes as long as all else.
    arguments = {"server_settings": {"application_name": name}, "timeout": 5, "ssl": False, **connecting}
    return create_async_engine(terms.dsn, connect_args=arguments)
