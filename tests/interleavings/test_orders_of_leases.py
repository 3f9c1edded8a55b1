"""A lease that ran out, floors, and prune: whoever is late changes nothing, and nothing owed is passed or forgotten."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

import pytest

from outbox.lease import heartbeat
from outbox.secondaries.base import Rejected, Retry
from tests.interleavings.hand import LONG, Hand, Pruner, Writer
from tests.interleavings.orders import Family
from tests.interleavings.player import Step, explore
from tests.interleavings.scenes import Scene
from tests.interleavings.stage import MIRROR, Stage
from tests.relaying import change

# Hundreds of orders in one test, on a machine that may have other things to do.
pytestmark = pytest.mark.timeout(900)

LATE = timedelta(seconds=-1)
TAKES_OVER = ("find_lost", "take_over", "end", "turn", "resume", "commit")

LOST = Family(
    "settle and a lost lease",
    {"late": ("load", "heartbeat", "settle", "end"), "other": TAKES_OVER},
    [("applied", "state"), ("retry", "state"), ("applied", "log"), ("rejected", "log")],
    most=50,
)

TAKEN_OVER_TWICE = Family(
    "two take over and one settles",
    {"late": ("settle", "end"), "one": ("find_lost", "take_over", "end"), "two": ("find_lost", "take_over", "end")},
    ["applied", "retry"],
    most=50,
)

FLOORS = Family(
    "floors and record",
    {"writer": ("record", "end"), "gate": ("close", "open"), "relay": ("floors", "floors", "carry")},
)

PRUNES = Family(
    "prune and carry",
    {"pruner": ("prune", "end"), "relay": ("turn", "take", "commit", "load", "settle", "end")},
    [("claim", "applied"), ("claim", "retry"), ("resume", "applied"), ("resume", "rejected")],
)

PRUNES_AND_RECORDS = Family(
    "prune, record and carry",
    {"pruner": ("prune", "end"), "writer": ("record", "end"), "relay": ("carry", "carry")},
)

FOLDS = Family(
    "fold, prune attempts, claim and settle",
    {"folder": ("fold", "prune", "end"), "one": ("settle", "end"), "two": ("turn", "take", "commit")},
    most=70,
)


class Lost(Scene):
    """One relay's lease ran out with two keys in hand, one of which has a newer event."""

    late: Hand

    async def open(self, outcome: str, ordering: str) -> Lost:
        await self.stage.clear(ordering)
        await self.write(change("a", 1), change("b", 1), change("a", 2))
        self.late = await self.hand("late", batch_size=2, lease=LATE)
        await self.late.turn()
        await self.late.claim()
        await self.late.commit()
        if outcome != "applied":
            self.secondary.script("a", Retry("busy") if outcome == "retry" else Rejected("refused"))
        self.others = [await self.hand(name) for name in ("other", "one", "two")]
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        late, other = self.late, self.others[0]
        return {
            "late": (late.load, self.heartbeat, late.settle, late.commit),
            "other": (other.find_lost, other.take_over, other.commit, other.turn, other.resume, other.commit),
        }

    async def heartbeat(self) -> None:
        ids = [attempt.attempt_id for attempt in self.late.attempts]
        self.renewed = await heartbeat(self.late.connection, "public", self.late.relay_id, MIRROR, ids, LONG)

    async def check(self) -> None:
        counted = "select count(*) from outbox_attempt where relay_id = $1 and finished_at is not null and lost = 0"
        ours = await self.stage.watching.fetchval(counted, self.late.relay_id)
        assert ours == sum(self.late.counted), "a settle said otherwise than the tables"
        await super().check()


@LOST.in_each_variant
async def test_a_settle_meets_who_takes_over(stage: Stage, variant: tuple[str, str]) -> None:
    """D5: exactly one of them closes the attempt; the loser has changed nothing."""
    await explore(LOST, lambda: Lost(stage).open(*variant))


class TakenOverTwice(Lost):
    """Two relays find the same lost attempt, and its holder wakes."""

    async def open(self, outcome: str, ordering: str = "state") -> TakenOverTwice:
        await super().open(outcome, ordering)
        await self.late.load()
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        _, one, two = self.others
        return {
            "late": (self.late.settle, self.late.commit),
            "one": (one.find_lost, one.take_over, one.commit),
            "two": (two.find_lost, two.take_over, two.commit),
        }


@TAKEN_OVER_TWICE.in_each_variant
async def test_two_take_over_what_its_holder_settles(stage: Stage, variant: str) -> None:
    """D5: one of three closes it, and its events are counted once."""
    await explore(TAKEN_OVER_TWICE, lambda: TakenOverTwice(stage).open(variant))


# Stops a recording statement after it has drawn its position and before it has written anything.
GATE = """
create function stop_at_gate() returns trigger language plpgsql as $$
begin
    perform pg_advisory_xact_lock_shared(1);
    return new;
end $$;
create trigger stop_at_gate before insert on outbox for each row execute function stop_at_gate();
create trigger stop_at_gate before insert on outbox_delivery for each row execute function stop_at_gate();
"""


class Floors(Scene):
    """A writer may be stopped in the middle of its statement, and commits late; a relay raises its floors meanwhile."""

    relay: Hand
    newer: Writer

    async def open(self) -> Floors:
        await self.stage.clear()
        self.relay = await self.hand("relay")
        self.newer = await self.writer("writer", change("late"))
        self.gate = await self.stage.connection("gate")
        # The first position after a restart is logged, and that alone gives its writer an id; the next 32 are not.
        await self.gate.execute("select nextval('outbox_event_id_seq')")
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        return {
            "writer": (self.newer.record, self.newer.end),
            "gate": (self.close, self.leave),
            "relay": (self.relay.raise_floors, self.relay.raise_floors, self.carry),
        }

    async def close(self) -> None:
        await self.gate.execute("select pg_advisory_lock(1)")

    async def leave(self) -> None:
        await self.gate.execute("select pg_advisory_unlock(1)")

    async def carry(self) -> None:
        """Deliver what the floors let be seen."""
        await self.relay.turn()
        await self.relay.claim()
        await self.relay.commit()
        await self.relay.load()
        await self.relay.settle()
        await self.relay.commit()

    async def check(self) -> None:
        await self.carry()
        assert self.secondary.sent_to("late"), "a floor passed what committed late"
        await super().check()


async def test_floors_rise_while_an_event_is_on_its_way(stage: Stage) -> None:
    """D3: a position that is drawn and not committed is never passed, wherever its writer was stopped."""
    await stage.watching.execute(GATE)
    await explore(FLOORS, lambda: Floors(stage).open())


class Prunes(Scene):
    """A relay carries what is old enough to be pruned."""

    relay: Hand

    async def open(self, take: str, outcome: str) -> Prunes:
        await self.stage.clear()
        if take == "resume":
            await self.hold("a", Retry("busy"))
        await self.write(change("a", 1), change("b", 1), change("a", 2))
        if outcome != "applied":
            self.secondary.script("a", Retry("busy") if outcome == "retry" else Rejected("refused"))
        self.recorded = await self.stage.watching.fetchval("select count(*) from outbox")
        self.take = take
        self.relay = await self.hand("relay")
        self.pruner = Pruner(await self.stage.connection("pruner"))
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        relay = self.relay
        take = relay.claim if self.take == "claim" else relay.resume
        return {
            "pruner": (self.pruner.events, self.pruner.end),
            "relay": (relay.turn, take, relay.commit, relay.load, relay.settle, relay.commit),
        }

    async def check(self) -> None:
        assert all(self.relay.counted)
        await super().check()
        self.started_in_order("a", "b")
        await self.forgotten()

    async def forgotten(self) -> None:
        """What is left when all is done is forgotten, but for what is dead."""
        await self.pruner.events()
        await self.pruner.end()
        kept = "select count(*) from outbox where event_id not in (select unnest(event_ids) from outbox_hold)"
        assert await self.stage.watching.fetchval(kept) == 0
        await self.watch()


@PRUNES.in_each_variant
async def test_prune_while_a_relay_carries(stage: Stage, variant: tuple[str, str]) -> None:
    """D8: one snapshot decides; what is between two places is in one of them."""
    await explore(PRUNES, lambda: Prunes(stage).open(*variant))


class PrunesAndRecords(Prunes):
    """A newer event is recorded meanwhile."""

    async def open(self, take: str = "resume", outcome: str = "retry") -> PrunesAndRecords:
        await super().open(take, outcome)
        self.newer = await self.writer("writer", change("a", 3))
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        return {
            "pruner": (self.pruner.events, self.pruner.end),
            "writer": (self.newer.record, self.end),
            "relay": (self.relay.carry, self.relay.carry),
        }

    async def end(self) -> None:
        await self.newer.end()
        assert self.recorded is not None
        self.recorded += 1


async def test_prune_while_an_event_is_recorded_and_carried(stage: Stage) -> None:
    """D8: what commits during a prune is not forgotten by it."""
    await explore(PRUNES_AND_RECORDS, lambda: PrunesAndRecords(stage).open())


class Folds(Prunes):
    """The totals are made of closed attempts, and these forgotten, while one is settled and another opened."""

    async def open(self, take: str = "claim", outcome: str = "applied") -> Folds:
        await super().open(take, outcome)
        self.one = await self.hand("one", batch_size=2)
        await self.one.turn()
        await self.one.claim()
        await self.one.commit()
        await self.one.load()
        self.relay = await self.hand("two")
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        pruner, one, two = self.pruner, self.one, self.relay
        return {
            "folder": (pruner.fold, pruner.attempts, pruner.end),
            "one": (one.settle, one.commit),
            "two": (two.turn, two.claim, two.commit),
        }

    async def check(self) -> None:
        assert self.one.counted == [True]
        await super().check()


async def test_fold_and_forget_attempts_while_relays_work(stage: Stage) -> None:
    """D8: no attempt is counted twice or not at all, and none that is open is forgotten."""
    await explore(FOLDS, lambda: Folds(stage).open())
