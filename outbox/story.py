"""Story: what is known of one resource on both sides, and what each secondary waits for, in one plain sentence."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec

from outbox.source import InPrimary

__all__ = ["Copy", "GivenUp", "Handed", "Holding", "KeptEvent", "Moves", "Standing", "Story", "instant", "moves_of"]

_RELAY = 8


class KeptEvent(msgspec.Struct, frozen=True):
    """An event of the resource that is still kept: who recorded what and when, never its content."""

    position: int
    operation: str
    version: str | None
    created_at: datetime
    correlation_id: str | None
    actor: str | None


class Copy(msgspec.Struct, frozen=True):
    """What a secondary answered: whether it has the resource, and whether that is what the primary has.

    `present` and `equal` are None where nobody can say; then `unknown` says why.
    """

    present: bool | None = None
    position: int | None = None
    digest: str | None = None
    equal: bool | None = None
    unknown: str | None = None


class Handed(msgspec.Struct, frozen=True):
    """An attempt that had the resource in hand, with others of its batch: `events` and outcomes count all of them.

    `positions` are those of the resource's events that are still kept.
    """

    attempt_id: int
    relay_id: str
    started_at: datetime
    lease_until: datetime
    finished_at: datetime | None
    positions: tuple[int, ...]
    events: int
    applied: int
    stale: int
    superseded: int
    retried: int
    rejected: int
    released: int
    lost: int
    error_code: str | None


class Holding(msgspec.Struct, frozen=True):
    """The resource is held back: `released`, `retrying` or `dead`. `positions` are owed, and not in hand."""

    state: str
    positions: tuple[int, ...]
    attempts: int
    error_code: str | None
    error: str | None
    first_failed_at: datetime | None
    last_failed_at: datetime | None
    next_attempt_at: datetime | None


class GivenUp(msgspec.Struct, frozen=True):
    """What an operator gave up: events of the resource from `oldest` to `position`, and why."""

    position: int
    oldest: int
    attempts: int
    error_code: str | None
    reason: str
    discarded_at: datetime


class Standing(msgspec.Struct, frozen=True):
    """How one secondary stands with the resource. `status` is None where the registry does not have it.

    `beyond` is a position it holds that the primary has not given. `pending` are positions that no relay took yet,
    `ahead` how many deliveries lie before them in their lane (counted up to 10,000). `attempts` are the latest first.
    `moves_at` is when what it waits for will move, where that is known.
    """

    backend_id: str
    status: str | None
    ordering: str = "state"
    wanted: bool = True
    breaker: str = "closed"
    breaker_until: datetime | None = None
    looked_at: datetime | None = None
    silence: timedelta = timedelta(0)
    beyond: int | None = None
    pending: tuple[int, ...] = ()
    ahead: int = 0
    in_hand: tuple[Handed, ...] = ()
    held: Holding | None = None
    given_up: tuple[GivenUp, ...] = ()
    attempts: tuple[Handed, ...] = ()
    copy: Copy = Copy()
    waits_for: str = ""
    moves_at: datetime | None = None

    @property
    def owed(self) -> bool:
        """Whether anything of the resource is still owed to it: pending, in hand or held."""
        return bool(self.pending or self.in_hand or self.held)

    @property
    def in_step(self) -> bool:
        """Whether nothing is owed and it was seen to hold what the primary holds, or does not take the resource."""
        return not self.owed and (self.copy.equal is True or self.status == "removed" or not self.wanted)


class Story(msgspec.Struct, frozen=True):
    """One resource on both sides, the primary's side in one snapshot taken `at` its time. Never content.

    `events` are the latest first, `events_kept` how many there are.
    """

    tenant_id: str
    resource_type: str
    resource_id: str
    at: datetime
    primary: InPrimary
    events: tuple[KeptEvent, ...]
    events_kept: int
    secondaries: tuple[Standing, ...]

    @property
    def in_step(self) -> bool:
        """Whether there is a secondary, and each is in step with the primary."""
        return bool(self.secondaries) and all(each.in_step for each in self.secondaries)


class Moves(NamedTuple):
    """What a secondary waits for, and when that moves, if it is known."""

    waits_for: str
    at: datetime | None = None


def moves_of(standing: Standing, newest: int, at: datetime, silence_limit: timedelta | None) -> Moves:
    """Say what a secondary waits for, given the position of the newest kept event: one sentence, what comes first."""
    if not standing.owed:
        return _nothing_owed(standing, newest)
    if leased := [attempt for attempt in standing.in_hand if attempt.lease_until >= at]:
        return _in_hand(standing, leased[0])
    return (
        _for_somebody(standing)
        or _for_a_relay(standing, silence_limit)
        or _for_the_breaker(standing)
        or _for_a_claim(standing, at)
    )


def instant(at: datetime | None) -> str:
    """Return a time as the stories tell it: UTC, to the second."""
    return "" if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _nothing_owed(standing: Standing, newest: int) -> Moves:
    name, held = standing.backend_id, standing.copy
    given_up = next(iter(standing.given_up), None)
    if standing.status is None:
        return Moves("nothing: the registry does not have it; a relay or register() puts it there")
    if standing.status == "removed":
        said = "nothing: it is removed, and nothing more is carried to it"
    elif not standing.wanted:
        said = "nothing: it does not take this tenant or type"
    elif given_up is not None and given_up.position >= newest and held.equal is not True:
        said = f"nothing: event {given_up.position} was given up ({given_up.reason}); write the resource again"
    elif held.equal:
        said = "nothing: it is in step"
    elif held.unknown is not None:
        said = f"nothing that is owed; {held.unknown}"
    else:
        said = f"nothing, though it differs: outbox reconcile {name} --repair restores it"
    return Moves(said)


def _in_hand(standing: Standing, attempt: Handed) -> Moves:
    relay, until = attempt.relay_id[:_RELAY], instant(attempt.lease_until)
    behind = [*(standing.held.positions if standing.held else ()), *standing.pending]
    lease = f"its lease ends at {until}, unless the relay renews it"
    if behind:
        return Moves(
            f"{_listed(behind)} behind the key's earlier event in attempt "
            f"{attempt.attempt_id} of relay {relay}; {lease}",
            attempt.lease_until,
        )
    since = instant(attempt.started_at)
    return Moves(
        f"attempt {attempt.attempt_id} of relay {relay} has it in hand since {since}; {lease}", attempt.lease_until
    )


def _for_somebody(standing: Standing) -> Moves | None:
    """What only a person can move."""
    name, held = standing.backend_id, standing.held
    if standing.status == "removed":
        return Moves("nothing that will come: the secondary was removed before it had this")
    # In state order a newer event revives a dead key; in log order it waits behind it.
    if held is not None and held.state == "dead" and not (standing.ordering == "state" and standing.pending):
        why = f"after {_times(held.attempts, 'attempt')} ({held.error_code or 'unknown'})"
        return Moves(f"somebody: it is dead {why}; outbox failures redrive, or write the resource again")
    if standing.beyond is not None:
        return Moves(
            f"somebody: {name} holds position {standing.beyond}, which the primary has not given; outbox doctor"
        )
    if standing.status == "paused":
        return Moves(f"an operator: {name} is paused; outbox resume {name} goes on with it")
    return None


def _for_a_relay(standing: Standing, limit: timedelta | None) -> Moves | None:
    if standing.looked_at is None:
        return Moves("a relay: none has ever asked what is due for this secondary")
    if limit is not None and standing.silence > limit:
        return Moves(f"a relay: none has asked what is due since {instant(standing.looked_at)}")
    return None


def _for_the_breaker(standing: Standing) -> Moves | None:
    until = standing.breaker_until
    if standing.breaker == "open" and until is not None:
        return Moves(f"the secondary, which does not answer: its breaker is open until {instant(until)}", until)
    if standing.breaker != "closed":
        return Moves("the secondary, which did not answer: one probe is under way, and decides")
    return None


def _for_a_claim(standing: Standing, at: datetime) -> Moves:
    held = standing.held
    if standing.in_hand:
        attempt = standing.in_hand[0]
        ended = f"the lease of attempt {attempt.attempt_id} ended at {instant(attempt.lease_until)}"
        return Moves(f"a relay's next claim: {ended}, and what it had is tried again", attempt.lease_until)
    if held is not None and held.next_attempt_at is not None and held.next_attempt_at > at:
        return Moves(
            f"its next attempt, number {held.attempts + 1}, at {instant(held.next_attempt_at)}", held.next_attempt_at
        )
    if held is None and standing.ahead:
        most = "at least " if standing.ahead >= 10_000 else ""
        return Moves(
            f"its turn: {most}{_times(standing.ahead, 'delivery lies', 'deliveries lie')} before it in its lane", None
        )
    return Moves("a relay's next claim: it is due", at)


def _listed(positions: Sequence[int]) -> str:
    more = len(positions) - 1
    return f"event {positions[0]} and {more} more wait" if more else f"event {positions[0]} waits"


def _times(count: int, one: str, many: str | None = None) -> str:
    return f"1 {one}" if count == 1 else f"{count:,} {many or one + 's'}"
