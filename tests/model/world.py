"""The state of one example: the model, and the real system beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from outbox import Registration, SyncToken
from outbox.carrier import Carrier
from tests.model.ground import BATCHES, Ground, InHand, Moody
from tests.model.model import Event, Key, Model
from tests.model.writing import ByHand, Captured

TENANTS = {"search": ("north", "south"), "archive": ("north",)}
KEYS: list[Key] = [("north", "a"), ("north", "b"), ("south", "c")]

A_NAME = st.sampled_from(sorted(TENANTS))
A_RELAY = st.sampled_from(sorted(BATCHES))
VICTIMS = st.sets(st.sampled_from([name for _, name in KEYS]), min_size=1)

_T = TypeVar("_T")


@dataclass
class Open:
    """A transaction that is open: what it wrote in each savepoint, the outermost first."""

    writing: Captured | ByHand
    written: list[list[Event]] = field(default_factory=lambda: [[]])

    @property
    def events(self) -> list[Event]:
        return [event for frame in self.written for event in frame]

    @property
    def tokens(self) -> list[SyncToken]:
        """What is known of it before it ends."""
        return self.writing.tokens if isinstance(self.writing, ByHand) else []


class World(RuleBasedStateMachine):
    """Two secondaries, one in each order; two relays whose steps may come late or never; one writer who takes long."""

    def __init__(self, ground: Ground, tally: Counter[str]) -> None:
        super().__init__()
        self.ground = ground
        self.tally = tally
        self.model = Model(search=(False, TENANTS["search"]), archive=(True, TENANTS["archive"]))
        self.secondaries = {name: Moody(name) for name in TENANTS}
        self.registrations = {
            "search": Registration(self.secondaries["search"]),
            "archive": Registration(self.secondaries["archive"], ordering="log", tenant_ids=["north"]),
        }
        self.manager = ground.manager(*self.registrations.values())
        self.carriers = {(name, relay): self.carrier(name, relay) for name in TENANTS for relay in BATCHES}
        self.in_hand: list[InHand] = []
        self.slow: Open | None = None
        self.touched: set[Key] = set()
        self.tokens: list[SyncToken] = []
        self.undone: list[SyncToken] = []
        self.seen: dict[str, dict[Key, int]] = {name: {} for name in TENANTS}
        self.contents = 0
        # Whether a secondary was away, so that its breaker may be open.
        self.refused = False
        self.run(self._begin())

    async def _begin(self) -> None:
        await self.ground.empty()
        await self.manager.register()

    def carrier(self, name: str, relay: str) -> Carrier:
        return self.ground.carrier(self.registrations[name], relay)

    def run(self, step: Coroutine[Any, Any, _T]) -> _T:
        """Take a step of the real system."""
        return self.ground.runner.run(step)

    def waiting(self, name: str) -> set[int]:
        return {position for backend_id, position in self.run(self.ground.waiting()) if backend_id == name}

    def committed(self, position: int, event: Event) -> None:
        """Tell the model of an event that is there now."""
        self.model.commit(position, event)
        if event.content is None:
            self.model.rows.pop(event.key, None)
        else:
            self.model.rows[event.key] = event.content
