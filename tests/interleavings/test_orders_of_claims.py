"""Claim against claim, settle, and record: whatever the order, each event is delivered once, and keys in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

from outbox.errors import Unavailable
from outbox.secondaries.base import Rejected, Retry
from tests.interleavings.hand import Hand, Writer
from tests.interleavings.orders import Family
from tests.interleavings.player import Step, explore
from tests.interleavings.scenes import Scene
from tests.interleavings.stage import Stage
from tests.relaying import change

# Hundreds of orders in one test, on a machine that may have other things to do.
pytestmark = pytest.mark.timeout(900)

CLAIM = ("turn", "take", "commit")
CARRY = (*CLAIM, "load", "settle", "end")

CLAIMS = Family(
    "claim and claim",
    {"one": CARRY, "two": CLAIM},
    [
        ("claim", "claim", "state"),
        ("claim", "claim", "log"),
        ("claim", "seize", "state"),
        ("resume", "claim", "state"),
        ("claim", "resume", "log"),
        ("resume", "resume", "state"),
        ("resume", "seize", "log"),
    ],
    most=50,
)

SETTLES = Family(
    "claim and settle",
    {"one": ("settle", "end"), "two": CLAIM},
    [
        (outcome, take, ordering)
        for outcome in ("applied", "retry", "rejected", "unavailable")
        for take in ("claim", "resume")
        for ordering in ("state", "log")
    ],
)

ABSORBS = Family(
    "absorb and record",
    {"writer": ("record", "end"), "relay": CARRY},
    [
        (held, ordering, ending)
        for held in ("due", "not due", "dead")
        for ordering in ("state", "log")
        for ending in ("commit", "rollback")
    ],
)

OF_ONE_KEY = Family(
    "two writers of a key and a claim",
    {"one": ("change", "record", "end"), "two": ("change", "record", "end"), "relay": ("turn", "take", "commit")},
    [("commit", "commit"), ("rollback", "commit")],
    most=70,
)


class Claims(Scene):
    """Three events of two keys, of which the first relay takes two; where a relay resumes, one key was held before."""

    one: Hand
    two: Hand

    async def open(self, first: str, second: str, ordering: str) -> Claims:
        await self.stage.clear(ordering)
        if "resume" in (first, second):
            await self.hold("a", Retry("busy"))
        self.positions = await self.write(change("a", 1), change("b", 1), change("a", 2))
        self.one = await self.hand("one", batch_size=2)
        self.two = await self.hand("two")
        self.first, self.second = first, second
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        one, two = self.one, self.two
        return {
            "one": (one.turn, self._take(one, self.first), one.commit, one.load, one.settle, one.commit),
            "two": (two.turn, self._take(two, self.second), two.commit),
        }

    async def waits(self, actor: str) -> bool:
        """Nobody here ever waits for a lock: whoever cannot have something passes it by."""
        assert not await super().waits(actor), f"{actor} waits for a lock"
        return False

    def _take(self, hand: Hand, how: str) -> Step:
        if how == "seize":
            return lambda: hand.seize(*self.positions)
        return hand.claim if how == "claim" else hand.resume

    async def check(self) -> None:
        await self.two.load()
        await self.two.settle()
        await self.two.commit()
        assert all(self.one.counted + self.two.counted), "a holder's settle did not count"
        await super().check()
        self.started_in_order("a", "b")


@CLAIMS.in_each_variant
async def test_two_relays_claim(stage: Stage, variant: tuple[str, str, str]) -> None:
    """D1, D2: never a key in two hands, never an event twice, whoever claims what and when."""
    await explore(CLAIMS, lambda: Claims(stage).open(*variant))


class Settles(Claims):
    """The first relay has two keys in hand, and one of them has a newer event."""

    async def open(self, outcome: str, take: str, ordering: str) -> Settles:
        await self.stage.clear(ordering)
        self.positions = await self.write(change("a", 1), change("b", 1), change("a", 2))
        self.one = await self.hand("one", batch_size=2)
        self.two = await self.hand("two")
        self.second = take
        await self.one.turn()
        await self.one.claim()
        await self.one.commit()
        await self._dispatch(outcome)
        return self

    async def _dispatch(self, outcome: str) -> None:
        if outcome in ("retry", "rejected"):
            self.secondary.script("a", Retry("busy") if outcome == "retry" else Rejected("refused"))
        if outcome == "unavailable":
            self.secondary.down = Unavailable("away", "not there")
        await self.one.load()
        self.secondary.down = None

    def steps(self) -> Mapping[str, Iterable[Step]]:
        one, two = self.one, self.two
        return {"one": (one.settle, one.commit), "two": (two.turn, self._take(two, self.second), two.commit)}


@SETTLES.in_each_variant
async def test_a_relay_claims_while_another_settles(stage: Stage, variant: tuple[str, str, str]) -> None:
    """D2: what is on its way from a hand into a hold is neither lost nor passed by."""
    await explore(SETTLES, lambda: Settles(stage).open(*variant))


class Absorbs(Scene):
    """A key is held, and a newer event of it is recorded while a relay resumes."""

    relay: Hand
    newer: Writer

    async def open(self, held: str, ordering: str, ending: str) -> Absorbs:
        await self.stage.clear(ordering)
        await self.hold("a", Rejected("refused") if held == "dead" else Retry("busy"), due=held == "due")
        self.relay = await self.hand("relay")
        self.newer = await self.writer("writer", change("a", 1), ending)
        self.revives = held == "dead" and ordering == "state" and ending == "commit"
        self.stays_dead = held == "dead" and not self.revives
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        relay = self.relay
        return {
            "writer": (self.newer.record, self.newer.end),
            "relay": (relay.turn, relay.resume, relay.commit, relay.load, relay.settle, relay.commit),
        }

    async def check(self) -> None:
        assert all(self.relay.counted)
        await super().check()
        self.started_in_order("a")
        dead = await self.stage.watching.fetchval("select count(*) from outbox_hold where state = 'dead'")
        assert dead == self.stays_dead


@ABSORBS.in_each_variant
async def test_a_held_key_gets_a_newer_event(stage: Stage, variant: tuple[str, str, str]) -> None:
    """D2: the hold absorbs it, is done before it, or is revived by it; it never passes what is held."""
    await explore(ABSORBS, lambda: Absorbs(stage).open(*variant))


class OfOneKey(Scene):
    """Two applications write one row, and a relay claims."""

    relay: Hand

    async def open(self, *endings: str) -> OfOneKey:
        await self.stage.clear()
        self.relay = await self.hand("relay")
        names = ("one", "two")
        self.writers = [
            await self.writer(name, change("a", number), ending)
            for number, (name, ending) in enumerate(zip(names, endings, strict=True))
        ]
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        one, two = self.writers
        relay = self.relay
        return {
            "one": (one.change, one.record, one.end),
            "two": (two.change, two.record, two.end),
            "relay": (relay.turn, relay.claim, relay.commit),
        }

    async def check(self) -> None:
        await self.relay.load()
        await self.relay.settle()
        await self.relay.commit()
        await super().check()
        self.started_in_order("a")
        row = await self.stage.watching.fetchval("select content from note where number = 'a'")
        assert self.secondary.content_of("Thing", "a") == row, "positions are not in commit order"


@OF_ONE_KEY.in_each_variant
async def test_two_write_one_key_while_a_relay_claims(stage: Stage, variant: tuple[str, str]) -> None:
    """D3: the row's lock puts positions in commit order, and a relay starts them so."""
    await explore(OF_ONE_KEY, lambda: OfOneKey(stage).open(*variant))
