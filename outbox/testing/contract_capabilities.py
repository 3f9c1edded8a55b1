"""The part of the conformance suite that is about what a secondary may do beyond `apply` and `scan`.

Every test is of one capability. For a secondary without it the test is skipped as not applicable, with the name of
what is missing, so that a summary of the run counts what was not shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product
from typing import ClassVar, NoReturn

import pytest

from outbox.content import fingerprint
from outbox.event import SyncEvent
from outbox.secondaries.base import Findable, Listable, Positioned, ResourceDigest, Secondary, Summable, Summary
from outbox.testing.states import CONTENTS, IDS, PLACE, Place, held, remove, seen, visible, write

__all__ = ["CapabilityContract"]


class CapabilityContract:
    """What `SecondaryContract` tests of the optional protocols in `outbox.secondaries.base`."""

    refuses: ClassVar[frozenset[str]] = frozenset()

    async def test_find_where_nothing_is(self, secondary: Secondary) -> None:
        """What was never written, in a type or tenant that is not there, is not found, and no error."""
        assert await _found(secondary, ["p"]) == await _found(secondary, []) == []
        await secondary.apply([write("p", 1)])
        for place in (("acme", "Unknown"), ("nobody", "Patient")):
            assert await _found(secondary, ["p"], place) == []

    async def test_find_shows_what_a_scan_shows(self, secondary: Secondary) -> None:
        """Each odd id by itself, none of the deleted, those asked for twice once."""
        batch = [write(name, position) for position, name in enumerate(IDS, 1)]
        await secondary.apply([*batch, write(IDS[0], 2_000, place=("other", "Patient"))])
        await secondary.apply([remove(name, 1_000) for name in IDS[::3]])
        alive = [event for event in batch if event.resource_id not in IDS[::3]]
        assert await _found(secondary, [*IDS, "missing", *IDS]) == held(alive) == await seen(secondary)
        for event in alive:
            assert await _found(secondary, [event.resource_id]) == held([event])

    async def test_find_follows_every_write(self, secondary: Secondary) -> None:
        """A resource that was created, changed, deleted and created again is found as it is now."""
        for event in (write("p", 1), write("p", 2), remove("p", 3), write("p", 2**62 + 1)):
            await secondary.apply([event])
            assert await _found(secondary, ["p"]) == held([event])
        await secondary.apply([write("p", 5)])
        assert await _found(secondary, ["p"]) == held([event])

    async def test_find_of_a_thousand(self, secondary: Secondary) -> None:
        """They are one question, also where only some are there."""
        batch = [write(f"p{number:04d}", number, CONTENTS["decimals"]) for number in range(1, 1_001)]
        await secondary.apply(batch[::2])
        assert await _found(secondary, [event.resource_id for event in batch]) == held(batch[::2])

    async def test_scopes(self, secondary: Secondary) -> None:
        """Every tenant and type with something live, however odd their names, and none other."""
        assert await _scopes(secondary) == []
        tenants = ("a", "A", "a/b", "a.b", "a_b", "a-b", ".", "t" * 64)
        types = ("b", "B", "b:c", "b/c", "%", "*", "b ", "b%3Ac", "é", "e\u0301", "_", "漢字", "x" * 128)
        places = sorted(product(tenants, types))
        await secondary.apply([write(name, 1, place=place) for place in places for name in ("p", "q")])
        assert await _scopes(secondary) == places
        await secondary.apply([remove("p", 2, place) for place in places])
        assert await _scopes(secondary) == places
        await secondary.apply([remove("q", 2, place) for place in places[1::2]])
        assert await _scopes(secondary) == places[::2]

    async def test_summary_of_every_content(self, secondary: Secondary) -> None:
        """The sum is what `fingerprint` gives for the exact text, whatever the text."""
        texts = [text for name, text in CONTENTS.items() if name not in self.refuses]
        pairs = enumerate(product("aé😀", texts), 1)
        named = [write(f"{letter}{number:02d}", number, text) for number, (letter, text) in pairs]
        await secondary.apply(named)
        assert await _summary(secondary) == _sum(named)
        for before, event in pairwise(named):
            assert await _summary(secondary, before.resource_id, event.resource_id) == _sum([event])

    async def test_summary_of_every_character(self, secondary: Secondary) -> None:
        """All of Unicode that JSON text may hold unescaped is hashed by its UTF-8 bytes."""
        codes = (code for code in range(0x20, 0x110000) if not 0xD800 <= code < 0xE000)
        letters = [letter for letter in map(chr, codes) if letter not in '"\\']
        parts = ["".join(letters[start : start + 16_384]) for start in range(0, len(letters), 16_384)]
        batch = [write(f"{part[0]}{n}", n, f'{{"{part[1]}":"{part}"}}') for n, part in enumerate(parts, 1)]
        await secondary.apply(batch)
        assert await _summary(secondary) == _sum(batch)

    async def test_summary_of_every_range(self, secondary: Secondary) -> None:
        """Behind one end and through the other, by the bytes of the id, and open where an end is None."""
        batch = [write(name, position) for position, name in enumerate(IDS, 1)]
        elsewhere = [write("b", 2_000, place=place) for place in (("other", "Patient"), ("acme", "B"))]
        await secondary.apply([*batch, *elsewhere])
        assert (whole := await _summary(secondary)) == _sum(batch)
        assert whole.total > 2**64
        ends = (None, *IDS[::7], "a0", "~", "\U0010ffff")
        for after, through in product(ends, ends):
            assert await _summary(secondary, after, through) == _sum(batch, after, through)

    async def test_summary_follows_every_write(self, secondary: Secondary) -> None:
        """Nothing is 0, what was deleted does not count, and another content is another sum."""
        assert await _summary(secondary) == Summary(0, 0)
        await secondary.apply([write("p", 1, '{"n":1}'), write("q", 2)])
        for event in (write("p", 3, '{"n":1.0}'), remove("p", 4), write("p", 5)):
            await secondary.apply([event])
            assert await _summary(secondary) == _sum([event, write("q", 2)])

    async def test_highest_position(self, secondary: Secondary) -> None:
        """Exact above what a double holds, of any tenant and type, deletes included, never lowered by what is stale."""
        if not isinstance(secondary, Positioned):
            _lacks(secondary, "highest_position")
        steps = (write("p", 9), write("q", 2**53 + 1), remove("p", 2**62 + 1, ("b", "C")), remove("q", 2**63 - 2))
        highest = 0
        for event in (*steps, write("q", 7), write("r", 8), remove("p", 10)):
            await visible(secondary)
            assert await secondary.highest_position() == highest
            await secondary.apply([event])
            highest = max(highest, event.position or 0)
        await visible(secondary)
        assert await secondary.highest_position() == 2**63 - 2


async def _found(secondary: Secondary, names: Sequence[str], place: Place = PLACE) -> list[ResourceDigest]:
    if not isinstance(secondary, Findable):
        _lacks(secondary, "find")
    await visible(secondary)
    found = await secondary.find(*place, names)
    return sorted(found, key=lambda digest: digest.resource_id.encode())


async def _scopes(secondary: Secondary) -> list[Place]:
    if not isinstance(secondary, Listable):
        _lacks(secondary, "scopes")
    await visible(secondary)
    return sorted(await secondary.scopes())


async def _summary(secondary: Secondary, after: str | None = None, through: str | None = None) -> Summary:
    if not isinstance(secondary, Summable):
        _lacks(secondary, "summarise")
    await visible(secondary)
    return await secondary.summarise(*PLACE, after, through)


def _sum(events: Sequence[SyncEvent], after: str | None = None, through: str | None = None) -> Summary:
    """Return what the summary of a range must be when the states of exactly these events are held."""
    prints = [
        fingerprint(event.resource_id, event.content)
        for event in events
        if event.content is not None
        and (after is None or event.resource_id.encode() > after.encode())
        and (through is None or event.resource_id.encode() <= through.encode())
    ]
    return Summary(len(prints), sum(prints))


def _lacks(secondary: Secondary, capability: str) -> NoReturn:
    pytest.skip(f"not applicable: {type(secondary).__name__} has no {capability}")
