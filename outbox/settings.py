"""How the outbox behaves: one frozen object, validated as a whole, from code, the environment or a TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from outbox.errors import SettingsError

__all__ = ["SyncConfig", "SyncMode"]

_IDENTIFIER = r"^[a-z_][a-z0-9_]{0,62}$"
_SECONDS = re.compile(r"\d+(\.\d+)?")


def _in_seconds(value: Any) -> Any:
    # The environment has no numbers.
    return float(value) if isinstance(value, str) and _SECONDS.fullmatch(value) else value


_InText = BeforeValidator(_in_seconds)
_Duration = Annotated[timedelta, _InText, Field(gt=timedelta(0), le=timedelta(days=366))]
# A file and an environment have no word for None.
_OrOff = BeforeValidator(lambda value: None if value == "off" else value)


class SyncMode(StrEnum):
    """Whether whoever writes waits for secondaries. Delivery is the same in all of them."""

    ASYNCHRONOUS = "asynchronous"
    """Nobody waits: a write is accepted once it is committed."""
    SYNCHRONOUS = "synchronous"
    """After the commit the caller waits for every secondary, up to `sync_timeout`."""
    HYBRID = "hybrid"
    """After the commit the caller waits for search secondaries, if `sync_for_search` says so, and for no others."""


class SyncConfig(BaseModel):
    """Every setting of a manager and its relays. Durations are `timedelta` in code, ISO 8601 or seconds in text.

    Raises `SettingsError` naming the field and what was expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    database_schema: Annotated[str, Field(pattern=_IDENTIFIER)] = "public"
    """The PostgreSQL schema of the outbox tables; every statement names it, `search_path` is never used."""

    mode: SyncMode = SyncMode.ASYNCHRONOUS
    """Whether `SyncManager.sync` waits for secondaries; a `Registration` and every single call may say otherwise."""

    sync_for_search: bool = True
    """Whether mode `hybrid` waits for secondaries whose role is search; without, it is `asynchronous`."""

    sync_timeout: _Duration = timedelta(seconds=5)
    """Longest time a caller waits for secondaries after its commit; what is not there by then is still on its way."""

    max_read_lag: Annotated[timedelta, _InText, Field(ge=timedelta(0), le=timedelta(days=366))] = timedelta(
        milliseconds=500
    )
    """Greatest age of what a secondary may still be missing when it is read, and how long a reader waits for it to be
    less; zero: only a secondary that misses nothing is read, and nobody waits."""

    batch_size: Annotated[int, Field(ge=1, le=10_000)] = 100
    """Most events handed to a secondary at once."""

    batch_bytes: Annotated[int, Field(ge=1, le=2**30)] = 8 * 1_048_576
    """Most bytes of content in memory for one batch: what does not fit is fetched and handed over in parts, each with
    its own `attempt_deadline`; an event that is larger goes alone. A relay holds at most this times
    `attempts_in_flight` for each of its secondaries, beside what their adapters make of it."""

    attempts_in_flight: Annotated[int, Field(ge=1, le=64)] = 8
    """Most batches one relay has out at one secondary at the same time."""

    poll_interval: _Duration = timedelta(milliseconds=200)
    """Longest sleep of an idle relay; polling alone bounds the delay, a wake-up only shortens it."""

    doorbell: bool = True
    """Whether recording rings the relays of other processes after commit. Off costs at most one poll interval."""

    lease: _Duration = timedelta(seconds=15)
    """How long an attempt holds its keys without a heartbeat; heartbeats come every third of it."""

    attempt_deadline: _Duration = timedelta(seconds=60)
    """Longest time a secondary may take for one batch, heartbeats or not."""

    max_attempts: Annotated[int, Field(ge=1, le=1_000_000)] = 12
    """Failures of one event, its secondary being available, after which it is dead."""

    retry_initial: _Duration = timedelta(milliseconds=200)
    """Upper bound of the first delay; each delay is drawn evenly between zero and its bound (full jitter)."""

    retry_multiplier: Annotated[float, Field(ge=1, le=10)] = 2.0
    """Growth of the bound from one failure to the next."""

    retry_max: _Duration = timedelta(minutes=10)
    """Cap of every delay, the first and a secondary's own Retry-After included."""

    breaker_threshold: Annotated[int, Field(ge=1, le=1_000)] = 3
    """Batches in a row that find a secondary unavailable before its breaker opens."""

    breaker_initial: _Duration = timedelta(milliseconds=500)
    """Wait before the first probe of an open breaker; doubles with every failed probe."""

    breaker_max: _Duration = timedelta(seconds=30)
    """Cap of the wait between probes."""

    keep_events: _Duration = timedelta(hours=1)
    """Age after which an event that every secondary has may be pruned."""

    keep_attempts: _Duration = timedelta(days=7)
    """Age after which a closed attempt is pruned, and a note of what was discarded once its event is gone; the counts
    live on in the registry."""

    prune_interval: _Duration = timedelta(seconds=5)
    """How often a relay folds finished attempts into the totals and prunes."""

    proof_interval: Annotated[_Duration | None, _OrOff] = timedelta(hours=1)
    """How often a relay that knows tracked classes compares each live secondary with the primary, in the background;
    None, in text `off`: never."""

    proof_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    """The share of the time that this takes at most; for the rest it sleeps."""

    shutdown_grace: _Duration = timedelta(seconds=10)
    """How long a stopping relay lets work in hand finish before it hands the rest back."""

    relay_connections: Annotated[int, Field(ge=2, le=100)] = 4
    """Connections of a relay's own pool, beside one reserved for heartbeats and listening."""

    statement_timeout: _Duration = timedelta(seconds=30)
    """Longest time one statement of a relay may take on the primary. A connection that is busy for twice as long is
    ended: the network swallowed the answer."""

    unhealthy_lag: Annotated[_Duration | None, _OrOff] = timedelta(seconds=30)
    """Age of the oldest owed delivery above which a live secondary is unhealthy; None, in text `off`: no limit."""

    unhealthy_pending: Annotated[Annotated[int, Field(ge=1)] | None, _OrOff] = 100_000
    """Owed deliveries above which a live secondary is unhealthy; None, in text `off`: no limit.

    How old is the better question: a load of many changes at once is no trouble while they go out fast. The default is
    what such a load does not leave behind for long.
    """

    failure_threshold: Annotated[int, Field(ge=1, le=30)] = 3
    """Attempts in a row that got nothing through after which a secondary is unhealthy."""

    success_threshold: Annotated[int, Field(ge=1, le=30)] = 2
    """Attempts in a row that got something through after which it is healthy again."""

    unhealthy_after_silence: Annotated[_Duration | None, _OrOff] = timedelta(seconds=30)
    """How long no relay may have asked what is due before a secondary is unhealthy, with something due or not; None, in
    text `off`: for ever, for those who only drain now and then. A relay says that it asked every `prune_interval`, and
    at least three times as often as this."""

    health_timeout: _Duration = timedelta(seconds=5)
    """Longest time the primary may take to answer how it is."""

    @model_validator(mode="wrap")
    @classmethod
    def _explained(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            config = handler(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise SettingsError(".".join(map(str, first["loc"])), first["msg"]) from None
        config.check_relations()
        return config

    @classmethod
    def load(cls, path: str | Path | None = None) -> SyncConfig:
        """Return the settings of the `[outbox]` table of a TOML file, overridden by `OUTBOX_<FIELD>` variables.

        Raises `SettingsError`; and `OSError` and `ValueError` for a file that cannot be read or is not TOML.
        """
        table = {} if path is None else tomllib.loads(Path(path).read_text()).get("outbox", {})
        if not isinstance(table, dict):
            raise SettingsError("outbox", "must be a table: [outbox]")
        environment = {
            field: os.environ[name] for field in cls.model_fields if (name := f"OUTBOX_{field.upper()}") in os.environ
        }
        return cls(**{**table, **environment})

    def check_relations(self) -> None:
        """Raise `SettingsError` when two settings contradict each other."""
        if self.retry_max < self.retry_initial:
            raise SettingsError("retry_max", "must not be below retry_initial")
        if self.breaker_max < self.breaker_initial:
            raise SettingsError("breaker_max", "must not be below breaker_initial")
        if self.attempt_deadline < self.lease / 3:
            raise SettingsError("attempt_deadline", "must leave room for one heartbeat (a third of the lease)")
        if self.unhealthy_after_silence and self.unhealthy_after_silence < 3 * self.poll_interval:
            raise SettingsError("unhealthy_after_silence", "must be three times poll_interval, or more")
