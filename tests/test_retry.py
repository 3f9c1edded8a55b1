"""When to try again: pure arithmetic on stored attempts, bounded for every input (B4, B5)."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenacity import (
    stop_after_attempt,
    stop_after_delay,
    stop_never,
    wait_chain,
    wait_exponential,
    wait_fixed,
    wait_incrementing,
    wait_none,
    wait_random,
)

from outbox import RetryPolicy, SettingsError, SyncConfig

ATTEMPTS = st.one_of(st.integers(1, 100), st.integers(1, 10**6))
AGES = st.timedeltas(timedelta(0), timedelta(days=36_500))
# Shared cores: how long one example takes says nothing.
calmly = settings(deadline=None)
SECONDS = st.floats(0.001, 10**6, allow_nan=False)


@st.composite
def configs(draw: st.DrawFn) -> SyncConfig:
    """Any valid policy settings that never give up within the attempts tried here."""
    initial = draw(SECONDS)
    return SyncConfig(
        retry_initial=timedelta(seconds=initial),
        retry_max=timedelta(seconds=draw(st.floats(initial, 31_000_000, allow_nan=False))),
        retry_multiplier=draw(st.floats(1, 10)),
        max_attempts=1_000_000,
    )


@calmly
@given(configs(), st.integers(1, 999_999), AGES, st.one_of(st.none(), st.timedeltas()))
def test_every_delay_lies_between_zero_and_the_cap(
    config: SyncConfig, attempts: int, age: timedelta, asked: timedelta | None
) -> None:
    """B5: whatever the attempt, the age, and what the secondary asked for; nothing overflows."""
    delay = RetryPolicy.from_config(config).delay(attempts, age, asked)
    assert delay is not None
    assert timedelta(0) <= delay <= config.retry_max


@calmly
@given(configs(), AGES, st.one_of(st.none(), st.timedeltas()))
def test_who_is_not_to_blame_waits_longer_and_longer_within_the_cap(
    config: SyncConfig, age: timedelta, asked: timedelta | None
) -> None:
    """Half of the time that it has been failing at least, and what was asked for; it is never dead."""
    policy = RetryPolicy.from_config(config.model_copy(update={"max_attempts": 1}))
    wait = policy.patience(age, asked)
    assert timedelta(0) <= wait <= config.retry_max
    assert wait >= min(max(age / 2, asked or age / 2), config.retry_max)
    assert wait <= max(age, asked or age, config.retry_initial)


@calmly
@given(configs(), ATTEMPTS)
def test_no_delay_exceeds_its_own_bound(config: SyncConfig, attempts: int) -> None:
    """B5: the bound doubles (or whatever the multiplier is) from the initial one, and not from one second."""
    policy = RetryPolicy.from_config(config.model_copy(update={"max_attempts": 10**7}))
    delay = policy.delay(attempts, timedelta(0))
    assert delay is not None
    doublings = min(math.log(config.retry_multiplier) * (attempts - 1), math.log(1e12))
    assert delay.total_seconds() <= config.retry_initial.total_seconds() * math.exp(doublings) * 1.000001 + 1e-6


@pytest.mark.parametrize(
    ("attempts", "bound"), [(1, 0.2), (2, 0.4), (5, 3.2), (12, 409.6), (30, 600.0), (10**6, 600.0)]
)
def test_full_jitter_spreads_evenly_below_the_bound(attempts: int, bound: float) -> None:
    """Design, retry: the defaults; a thousand draws come near both ends, and half of them lie in the lower half."""
    policy = RetryPolicy.from_config(SyncConfig(max_attempts=1_000_000))
    policy = RetryPolicy(policy.wait, stop_never, policy.longest)
    delays = [delay.total_seconds() for _ in range(1000) if (delay := policy.delay(attempts, timedelta(0)))]
    assert len(delays) > 990
    assert 0 <= min(delays) < bound * 0.05
    assert bound * 0.95 < max(delays) <= bound
    assert 400 < sum(delay < bound / 2 for delay in delays) < 600


def test_the_cap_holds_for_the_first_delay_too() -> None:
    """B5: also when the strategy is one's own and asks for more at once."""
    policy = RetryPolicy(wait_fixed(3600), stop_never, timedelta(minutes=1))
    assert policy.delay(1, timedelta(0)) == timedelta(minutes=1)
    with pytest.raises(SettingsError, match="retry_max"):
        SyncConfig(retry_initial=timedelta(seconds=2), retry_max=timedelta(seconds=1))


@calmly
@given(st.timedeltas(), st.floats(0, 1000))
def test_what_a_secondary_asks_for_only_lengthens_and_never_beyond_the_cap(asked: timedelta, own: float) -> None:
    """B4: negative, zero, huge; the longer of the two, clamped."""
    policy = RetryPolicy(wait_fixed(own), stop_never, timedelta(seconds=500))
    delay = policy.delay(3, timedelta(0), asked)
    expected = min(max(timedelta(seconds=own), asked), timedelta(seconds=500))
    assert delay is not None
    assert abs(delay - expected) <= timedelta(microseconds=1)


@calmly
@given(st.integers(1, 1000))
def test_an_event_is_dead_after_exactly_its_attempts(most: int) -> None:
    """B6: not one earlier, not one later."""
    policy = RetryPolicy.from_config(SyncConfig(max_attempts=most))
    if most > 1:
        assert policy.delay(most - 1, timedelta(0)) is not None
    assert policy.delay(most, timedelta(0)) is None
    assert policy.delay(most, timedelta(0), timedelta(seconds=5)) is None


def test_strategies_compose_as_they_do_in_tenacity() -> None:
    """Design, retry: by number or by age, sums and chains; the same every time they are asked."""
    wait = wait_chain(wait_fixed(1), wait_fixed(2), wait_incrementing(10, 5))
    policy = RetryPolicy(wait, stop_after_attempt(5) | stop_after_delay(3600), timedelta(days=1))
    for _ in range(2):
        waits = [policy.delay(attempts, timedelta(0)) for attempts in range(1, 6)]
        assert waits == [timedelta(seconds=each) for each in (1, 2, 20, 25)] + [None]
    assert policy.delay(1, timedelta(seconds=3599)) is not None
    assert policy.delay(1, timedelta(seconds=3600)) is None
    summed = RetryPolicy(wait_fixed(3) + wait_random(0, 1), stop_never, timedelta(days=1)).delay(1, timedelta(0))
    assert summed is not None
    assert timedelta(seconds=3) <= summed <= timedelta(seconds=4)


@calmly
@given(ATTEMPTS)
def test_a_strategy_that_overflows_still_ends_at_the_cap(attempts: int) -> None:
    """B5: 2.0 ** 2000 is an error in Python; tenacity's exponential says its maximum, and ours is below that."""
    policy = RetryPolicy(wait_exponential(multiplier=1, exp_base=10), stop_never, timedelta(hours=1))
    delay = policy.delay(attempts, timedelta(0))
    assert delay is not None
    assert timedelta(0) < delay <= timedelta(hours=1)


def test_no_wait_is_a_wait() -> None:
    """Due at once is not dead."""
    assert RetryPolicy(wait_none(), stop_never, timedelta(hours=1)).delay(7, timedelta(0)) == timedelta(0)
