"""How many orders are played in all: counted from what the families say, each of which asserts its own number."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from tests.interleavings.orders import FAMILIES, Family

LEAST = 2_000


def test_there_are_enough_of_them() -> None:
    """Whichever process plays which of them: every family asserts that it played as many as it says here."""
    for file in Path(__file__).parent.glob("test_orders_of_*.py"):
        import_module(f"tests.interleavings.{file.stem}")
    families = {family.name: family for family in FAMILIES}
    numbers = {name: family.played * len(family.variants) for name, family in families.items()}
    assert sum(numbers.values()) >= LEAST, numbers


def test_all_orders_are_found_once() -> None:
    """Two steps and three: ten ways, each with the steps of an actor as they follow each other."""
    family = Family.__new__(Family)
    object.__setattr__(family, "actors", {"a": ("1", "2"), "b": ("x", "y", "z")})
    object.__setattr__(family, "most", 1_000)
    orders = family.orders()
    assert family.possible == len(orders) == len(set(orders)) == 10
    for order in orders:
        assert [step for step in order if step[0] == "a"] == ["a.1", "a.2"]
        assert [step for step in order if step[0] == "b"] == ["b.x", "b.y", "b.z"]
