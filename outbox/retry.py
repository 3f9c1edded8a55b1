"""When to try again: tenacity's strategies, evaluated on what the database remembers."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Self

from tenacity import RetryCallState, Retrying, stop_after_attempt, wait_random, wait_random_exponential
from tenacity.stop import StopBaseT
from tenacity.wait import WaitBaseT

from outbox.settings import SyncConfig

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When a failed event is tried again, and when it is dead.

    `wait` and `stop` are tenacity's strategies and compose as they do there (`stop_after_attempt(5) |
    stop_after_delay(3600)`, `wait_fixed(1) + wait_random(0, 1)`). They see the stored attempt number and the time
    since the first failure, so they survive any restart. No delay exceeds `longest`.
    """

    wait: WaitBaseT
    stop: StopBaseT
    longest: timedelta

    @classmethod
    def from_config(cls, config: SyncConfig) -> Self:
        """Return full jitter (AWS Architecture Blog, "Exponential Backoff And Jitter") within the config's bounds."""
        wait = wait_random_exponential(
            multiplier=config.retry_initial.total_seconds(),
            max=config.retry_max.total_seconds(),
            exp_base=config.retry_multiplier,
        )
        return cls(wait, stop_after_attempt(config.max_attempts), config.retry_max)

    def delay(self, attempts: int, failing_for: timedelta, asked: timedelta | None = None) -> timedelta | None:
        """Return how long to wait after the `attempts`-th failure, or None when the event is dead.

        `asked` is a wait the secondary demanded (`Retry-After`); it lengthens the delay and never beyond `longest`.
        """
        state = _call_state(attempts, failing_for)
        if self.stop(state):
            return None
        seconds = max(0.0, float(self.wait(state)))
        longest = self.longest.total_seconds()
        if asked is not None:
            seconds = max(seconds, asked.total_seconds())
        return timedelta(seconds=min(seconds, longest))

    def patience(self, failing_for: timedelta, asked: timedelta | None = None) -> timedelta:
        """Return how long to wait where the event is not to blame: it is never dead.

        As long as after a first failure, and half of the time it has been failing at least, so that the waits grow
        exponentially without being counted; `asked` lengthens it, and nothing beyond `longest`.
        """
        state = _call_state(1, failing_for)
        grown = failing_for.total_seconds() * _HALF_OR_MORE(state)
        seconds = max(float(self.wait(state)), grown, asked.total_seconds() if asked is not None else 0.0)
        return timedelta(seconds=min(seconds, self.longest.total_seconds()))


_NO_RETRYING = Retrying()
_HALF_OR_MORE = wait_random(0.5, 1)


def _call_state(attempts: int, failing_for: timedelta) -> RetryCallState:
    state = RetryCallState(_NO_RETRYING, None, (), {})
    state.attempt_number = attempts
    state.start_time = 0.0
    state.outcome_timestamp = failing_for.total_seconds()
    return state
