"""Orders: in how many ways the steps of several actors can follow each other, all of them or a fair sample."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import factorial, prod
from typing import Any

import pytest

ASKED = "OUTBOX_TEST_ORDER"
"""Names an order to play alone, as a failure prints it: `one.turn two.turn one.claim ...`."""

Order = tuple[str, ...]
"""Steps as `actor.step`, in the order in which their turns come."""

FAMILIES: list[Family] = []


@dataclass(frozen=True)
class Family:
    """Actors with the names of their steps, and the variants that all orders are played in.

    Above `most` orders a sample is drawn, each order being as likely as any other.
    """

    name: str
    actors: Mapping[str, Sequence[str]]
    variants: Sequence[Any] = (None,)
    most: int = 1_000

    def __post_init__(self) -> None:
        FAMILIES.append(self)

    @property
    def possible(self) -> int:
        """How many orders there are."""
        lengths = [len(steps) for steps in self.actors.values()]
        return factorial(sum(lengths)) // prod(map(factorial, lengths))

    @property
    def played(self) -> int:
        """How many of them are played in each variant."""
        return min(self.possible, self.most)

    @property
    def in_each_variant(self) -> pytest.MarkDecorator:
        """Give a test each variant as `variant`, under a name that can be pasted."""
        names = ["-".join([each] if isinstance(each, str) else each).replace(" ", "_") for each in self.variants]
        return pytest.mark.parametrize("variant", self.variants, ids=names)

    def orders(self) -> list[Order]:
        """Every order, or a sample; the seed is the one that pytest prints."""
        if (asked := os.environ.get(ASKED)) is not None:
            return [self._asked(tuple(asked.split()))]
        if self.possible <= self.most:
            return [self._named(turns) for turns in _merges(Counter(self._lengths()))]
        return self._sample()

    def _asked(self, order: Order) -> Order:
        turns = [step.partition(".")[0] for step in order]
        assert Counter(turns) == Counter(self._lengths()), f"{ASKED} names no order of {self.name}"
        return order

    def _sample(self) -> list[Order]:
        turns = list(Counter(self._lengths()).elements())
        chosen: dict[Order, None] = {}
        while len(chosen) < self.most:
            random.shuffle(turns)
            chosen[self._named(turns)] = None
        return list(chosen)

    def _lengths(self) -> dict[str, int]:
        return {actor: len(steps) for actor, steps in self.actors.items()}

    def _named(self, turns: Sequence[str]) -> Order:
        left = {actor: iter(steps) for actor, steps in self.actors.items()}
        return tuple(f"{actor}.{next(left[actor])}" for actor in turns)


def _merges(left: Counter[str]) -> Iterator[list[str]]:
    if not left.total():
        yield []
    for actor in [actor for actor, steps in left.items() if steps]:
        left[actor] -= 1
        yield from ([actor, *rest] for rest in _merges(left))
        left[actor] += 1
