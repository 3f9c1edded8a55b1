"""Reconciliation: what a comparison is told, what it answers, and where it stands."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

import msgspec

from outbox.errors import SettingsError
from outbox.judge import Drift

__all__ = ["ReconciliationResult", "Standing", "Terms"]

_SAMPLES = 10


class Terms(msgspec.Struct, frozen=True):
    """How a comparison is done, and for whom.

    `patience`: how long, for each tenant and type, deliveries under way are waited for before what they carry is left
    out as in flight. `most_deletes`: repair deletes extras only while they are no more than this share of what the
    secondary holds (never fewer than ten), of a tenant and type and of all that was compared, and no more than
    `most_deleted`; so that a wrong or empty listing empties nothing, not even many small tenants one by one. `actor`
    and `reason` are written down with every repair: up to 256 and 1,024 bytes. Raises `SettingsError` for what is none.
    """

    patience: timedelta = timedelta(seconds=30)
    most_deletes: float = 0.05
    most_deleted: int = 10_000
    actor: str = ""
    reason: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.most_deletes <= 1:
            raise SettingsError("most_deletes", "must be between 0 and 1")
        for field, words, most in (("actor", self.actor, 256), ("reason", self.reason, 1_024)):
            if "\x00" in words or len(words.encode(errors="replace")) > most:
                raise SettingsError(field, f"must be text of up to {most:,} bytes, without NUL")


class ReconciliationResult(msgspec.Struct):
    """What a comparison found: exact counts, the first ten of each kind as `samples`.

    `in_flight` counts resources that differed only because a delivery was under way or failed, or because a write came
    in between; `in_flight_why` says which. `repaired` counts repair events recorded; `refused` extras left alone as too
    many looked deletable; `uncarried` what a repair left as it is because no event can carry it exactly, such as a row
    with a NaN. Whatever was recorded up to position `high_water` was taken into account. `listed` is of how
    many resources the content was read, the others being equal in sum.
    """

    backend_id: str
    primary_count: int = 0
    secondary_count: int = 0
    missing: int = 0
    extra: int = 0
    stale: int = 0
    altered: int = 0
    in_flight: int = 0
    repaired: int = 0
    refused: int = 0
    uncarried: int = 0
    listed: int = 0
    high_water: int = 0
    started_at: datetime | None = None
    duration: timedelta = timedelta(0)
    in_flight_why: dict[str, int] = msgspec.field(default_factory=dict)
    samples: list[Drift] = msgspec.field(default_factory=list)

    @property
    def in_sync(self) -> bool:
        """Whether nothing is missing, extra, stale or altered."""
        return not (self.missing or self.extra or self.stale or self.altered)

    @property
    def rate(self) -> float:
        """Resources of the larger side per second."""
        return max(self.primary_count, self.secondary_count) / max(self.duration.total_seconds(), 1e-6)

    def count(self, drifts: Sequence[Drift]) -> None:
        """Add what some suspects showed."""
        for drift in drifts:
            setattr(self, drift.kind, getattr(self, drift.kind) + 1)
            if sum(sample.kind == drift.kind for sample in self.samples) < _SAMPLES:
                self.samples.append(drift)

    def set_aside(self, others: dict[str, int]) -> None:
        """Add suspects that turned out to be none."""
        for why, number in others.items():
            self.in_flight += number
            self.in_flight_why[why] = self.in_flight_why.get(why, 0) + number


class Standing(msgspec.Struct, frozen=True):
    """Where a comparison stands: what it found up to `after` of a tenant and type. Whoever has it can go on there."""

    result: ReconciliationResult
    tenant_id: str
    resource_type: str
    after: str

    @property
    def scope(self) -> tuple[str, str]:
        """(tenant_id, resource_type)."""
        return self.tenant_id, self.resource_type
