"""Wait against commit, rollback, settle and prune: no answer is ever truer than the tables were."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import timedelta

import pytest

from outbox import waiters
from outbox.answer import SyncState, SyncStatus
from outbox.secondaries.base import Rejected, Retry
from outbox.waiters import Waiters
from tests.interleavings.gates import Gates
from tests.interleavings.hand import Hand, Pruner, Writer
from tests.interleavings.orders import Family
from tests.interleavings.player import Step, explore
from tests.interleavings.scenes import Scene
from tests.interleavings.stage import Stage
from tests.relaying import change

# Hundreds of orders in one test, on a machine that may have other things to do.
pytestmark = pytest.mark.timeout(900)

# A first look, what became of a transaction whose event it did not find, and a second look.
LOOK, FATE = "as its_own", "pg_xact_status"
ASKS = ("ask", "look", "fate", "again")

WAITS = Family(
    "record, carry and wait",
    {"writer": ("end",), "relay": ("carry", "settle", "end"), "caller": ASKS},
    [("commit", "applied"), ("commit", "retry"), ("commit", "rejected"), ("rollback", "applied")],
    most=45,
)

WAITS_FOR_ONE_OF_TWO = Family(
    "wait for what a newer event supersedes",
    {"writer": ("record", "end"), "relay": ("carry", "settle", "end"), "caller": ("ask", "look")},
    ["applied", "retry", "rejected"],
    most=45,
)

PRUNED = Family(
    "settle, prune and wait",
    {"relay": ("settle", "end"), "pruner": ("prune", "end"), "caller": ASKS},
    ["applied", "retry"],
    # All of them: only one in eighty asks how the transaction ended.
)


class Waits(Scene):
    """An event is recorded and not committed, and somebody waits for it while a relay claims."""

    relay: Hand
    newer: Writer
    gates: Gates
    answer: SyncStatus | None = None

    async def open(self, ending: str, outcome: str) -> Waits:
        await self.stage.clear()
        self.newer = await self.writer("writer", change("a", 1), ending)
        await self.newer.record()
        self.outcome = outcome
        await self._others()
        return self

    async def _others(self) -> None:
        self._script(self.outcome)
        self.relay = await self.hand("relay")
        self.gates = self.stage.gates("caller")
        self.token = self.newer.token
        self.ended = self.settled = False
        # What the tables said before the answer's last look could begin.
        self.ended_at_first: bool | None = None

    def _script(self, outcome: str) -> None:
        if outcome != "applied":
            self.secondary.script("a", Retry("busy") if outcome == "retry" else Rejected("refused"))

    def steps(self) -> Mapping[str, Iterable[Step]]:
        return {
            "writer": (self.end,),
            "relay": (self.carry, self.relay.settle, self.settle),
            "caller": self.gates.course((LOOK, FATE, LOOK), self.ask),
        }

    async def ask(self) -> None:
        self.ended_at_first = self.ended
        self.answer = await Waiters(self.gates.engine, "public").wait("mirror", self.token, timedelta(0))
        self.check_answer(self.answer.state)

    def check_answer(self, state: SyncState) -> None:
        """Compare with what was so when it was given, and for what may change, with what was so when it was asked."""
        if state.done:
            assert self.settled, "told to be there before it was"
            assert self.outcome == "applied"
            assert self.newer.commits
        elif state is SyncState.ROLLED_BACK:
            assert self.ended
            assert not self.newer.commits
        elif state is SyncState.UNCOMMITTED:
            assert not self.ended_at_first, "told to be uncommitted when it was over before the question"
        elif state is SyncState.FAILING:
            assert self.settled
            assert self.outcome == "retry"
        elif state is SyncState.DEAD:
            assert self.settled
            assert self.outcome == "rejected"
        else:
            assert state is SyncState.ACCEPTED
            assert self.newer.commits

    async def end(self) -> None:
        await self.newer.end()
        self.ended = True

    async def carry(self) -> None:
        await self.relay.turn()
        await self.relay.claim()
        await self.relay.commit()
        await self.relay.load()

    async def settle(self) -> None:
        await self.relay.commit()
        self.settled = bool(self.relay.attempts)

    async def check(self) -> None:
        assert self.answer is not None, "nobody was answered"
        await super().check()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look may be held up for as long as the others' turns take."""
    monkeypatch.setattr(waiters, "_FIRST_LOOK", 300.0)


@WAITS.in_each_variant
async def test_an_answer_while_its_event_commits_and_is_carried(stage: Stage, variant: tuple[str, str]) -> None:
    """C1, C4: never said to be there early, never said to be gone when it is about to come."""
    await explore(WAITS, lambda: Waits(stage).open(*variant))


class WaitsForOneOfTwo(Waits):
    """What is waited for is in a relay's reach, and a newer event of its key comes."""

    async def open(self, outcome: str, ending: str = "commit") -> WaitsForOneOfTwo:
        await self.stage.clear()
        older = await self.writer("older", change("a", 1))
        await older.record()
        await older.end()
        self.newer = await self.writer("writer", change("a", 2), ending)
        self.newer.token = older.token
        self.outcome = outcome
        await self._others()
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        return {
            "writer": (self.newer.record, self.end),
            "relay": (self.carry, self.relay.settle, self.settle),
            "caller": self.gates.course((LOOK,), self.ask),
        }


@WAITS_FOR_ONE_OF_TWO.in_each_variant
async def test_an_answer_while_a_newer_event_of_its_key_comes(stage: Stage, variant: str) -> None:
    """C4: what a newer event stands for is there when that one is, and not before."""
    await explore(WAITS_FOR_ONE_OF_TWO, lambda: WaitsForOneOfTwo(stage).open(variant))


class Pruned(Waits):
    """What is waited for is settled and forgotten."""

    async def open(self, outcome: str, ending: str = "commit") -> Pruned:
        await super().open(ending, outcome)
        await self.end()
        await self.carry()
        self.recorded = 1
        self.forgotten = False
        self.pruner = Pruner(await self.stage.connection("pruner"))
        return self

    def steps(self) -> Mapping[str, Iterable[Step]]:
        return {
            "relay": (self.relay.settle, self.settle),
            "pruner": (self.pruner.events, self.prune),
            # What is to be tried again is not pruned.
            "caller": self.gates.course((LOOK, FATE, LOOK), self.ask, never={FATE} if self.outcome == "retry" else ()),
        }

    async def prune(self) -> None:
        await self.pruner.end()
        self.forgotten = True

    def check_answer(self, state: SyncState) -> None:
        if state is SyncState.PRUNED:
            assert self.forgotten
            assert self.settled, "pruned before it was there"
        else:
            super().check_answer(state)


@PRUNED.in_each_variant
async def test_an_answer_while_its_event_is_forgotten(stage: Stage, variant: str) -> None:
    """C4: what is pruned is said to be pruned, never to be rolled back or unknown."""
    await explore(PRUNED, lambda: Pruned(stage).open(variant))
