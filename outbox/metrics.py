"""Metrics: the statuses as Prometheus reads them. The database says it, so every process says the same (D69)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from outbox.errors import SettingsError
from outbox.status import BackendSyncStatus

if TYPE_CHECKING:
    from prometheus_client.core import Metric

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Labels are the secondary's name and words of these tables. Tenants, types and ids would be content, and without end;
# an error's code is an adapter's word, of which there may be any number.
_GAUGES: dict[str, tuple[str, Callable[[BackendSyncStatus], float | None]]] = {
    "outbox_healthy": ("1 when nothing is wrong with the secondary", lambda status: status.healthy),
    "outbox_lag_seconds": (
        "Age of the oldest delivery that is owed, 0 when none is",
        lambda status: status.lag.total_seconds(),
    ),
    "outbox_silence_seconds": (
        "How long no relay has asked what is due",
        lambda status: status.silence.total_seconds(),
    ),
    "outbox_pending": (
        "Deliveries owed, those in flight, failing and dead included",
        lambda status: status.pending,
    ),
    "outbox_in_flight": ("Deliveries in the hands of a relay", lambda status: status.in_flight),
    "outbox_failing_keys": ("Keys that failed and are tried again", lambda status: status.failing),
    "outbox_dead_keys": ("Keys that nobody tries again by itself", lambda status: status.dead),
    "outbox_last_success_timestamp_seconds": (
        "When something last got through, by the database's clock; absent before",
        lambda status: status.last_success_at.timestamp() if status.last_success_at else None,
    ),
}
_STATES: dict[str, tuple[str, Callable[[BackendSyncStatus], str], tuple[str, ...]]] = {
    "outbox_status": (
        "1 for the status the secondary has",
        lambda status: status.status,
        ("shadow", "live", "paused", "draining", "removed"),
    ),
    "outbox_breaker": (
        "1 for the state the secondary's breaker is in",
        lambda status: status.breaker,
        ("closed", "open", "half_open"),
    ),
}
_OUTCOMES: dict[str, Callable[[BackendSyncStatus], int]] = {
    "applied": lambda status: status.applied,
    "stale": lambda status: status.stale,
    "superseded": lambda status: status.superseded,
    "retried": lambda status: status.retried,
    "rejected": lambda status: status.rejected,
    "lost": lambda status: status.lost,
    "discarded": lambda status: status.discarded,
}


def exposition(found: Sequence[BackendSyncStatus]) -> bytes:
    """Return statuses in Prometheus' text format, of `CONTENT_TYPE`. Raises `SettingsError` without its client."""
    try:
        # Here, because whoever asks for no metrics need not have it, nor wait for its import.
        from prometheus_client import generate_latest  # noqa: PLC0415
    except ModuleNotFoundError as missing:
        raise SettingsError("metrics", f"needs {missing.name}: pip install 'outbox-sync[metrics]'") from None
    return generate_latest(_Snapshot(found))


class _Snapshot:
    """One look at the database, as a collector. It is in no registry: what is not asked for costs no query."""

    def __init__(self, found: Sequence[BackendSyncStatus]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        """Yield every family, each with all secondaries."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily  # noqa: PLC0415

        for name, (says, value_of) in _GAUGES.items():
            gauge = GaugeMetricFamily(name, says, labels=["backend"])
            for status in self._found:
                if (value := value_of(status)) is not None:
                    gauge.add_metric([status.backend_id], value)
            yield gauge
        for name, (says, state_of, states) in _STATES.items():
            gauge = GaugeMetricFamily(name, says, labels=["backend", "state"])
            for status in self._found:
                for state in states:
                    gauge.add_metric([status.backend_id, state], state == state_of(status))
            yield gauge
        says = (
            "Deliveries by what became of them since the secondary was registered; one that is retried counts each time"
        )
        counter = CounterMetricFamily("outbox_deliveries_total", says, labels=["backend", "outcome"])
        for status in self._found:
            for outcome, count_of in _OUTCOMES.items():
                counter.add_metric([status.backend_id, outcome], count_of(status))
        yield counter
