"""The conformance suite: what every secondary must do, as tests to inherit.

A backend's test file is a subclass with one fixture, a fresh and empty secondary::

    class TestSearch(SecondaryContract):
        refuses = frozenset({"empty key"})

        @pytest.fixture
        async def secondary(self, search_url): ...

`pytest.register_assert_rewrite("outbox.testing")` in a conftest shows the compared values.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, Iterable
from itertools import chain, permutations, product

import pytest

from outbox.event import SyncEvent
from outbox.secondaries.base import Applied, Checkable, Closeable, Outcome, Rejected, Secondary, Stale
from outbox.testing.contract_capabilities import CapabilityContract
from outbox.testing.states import CONTENTS, IDS, PLACE, at, held, remove, seen, write

__all__ = ["SecondaryContract"]


def _kinds(outcomes: Iterable[Outcome]) -> list[type[Outcome]]:
    return [type(outcome) for outcome in outcomes]


def _without_repeats(events: Iterable[SyncEvent]) -> list[list[SyncEvent]]:
    """Cut events into batches in which no key is twice, as a relay does."""
    batches: list[list[SyncEvent]] = [[]]
    for event in events:
        if event.resource_id in {other.resource_id for other in batches[-1]}:
            batches.append([])
        batches[-1].append(event)
    return batches


@pytest.mark.asyncio
class SecondaryContract(CapabilityContract):
    """Inherit, give a fixture `secondary`, and every promise of `Secondary` is tested, and of what else it can do.

    `refuses` names the `CONTENTS` that the backend cannot hold and answers with `Rejected`.
    """

    async def test_create_update_delete(self, secondary: Secondary) -> None:
        """Each can be read back at once."""
        created = at(1, SyncEvent.create("Patient", "p", {"n": 1}, tenant_id="acme"))
        for event in (created, write("p", 2), remove("p", 3)):
            assert list(await secondary.apply([event])) == [Applied()]
            assert await seen(secondary) == held([event])

    async def test_same_batch_twice(self, secondary: Secondary) -> None:
        """A repeated delivery is done and changes nothing."""
        assert list(await secondary.apply([])) == []
        batch = [write("a", 1), remove("b", 2), write("c", 3)]
        assert _kinds(await secondary.apply(batch)) == [Applied] * 3
        assert set(_kinds(await secondary.apply(batch))) <= {Applied, Stale}
        assert await seen(secondary) == held(batch)

    @pytest.mark.parametrize("deleted", [1, 2, 3])
    async def test_every_order_of_arrival(self, secondary: Secondary, deleted: int) -> None:
        """Three events of one key end in the state of the last, in whatever order they come."""
        orders = list(enumerate(permutations((1, 2, 3))))
        for step in range(3):
            came = [(f"p{number}", order[step]) for number, order in orders]
            await secondary.apply([(remove if n == deleted else write)(key, n) for key, n in came])
        alive = [] if deleted == 3 else [write(f"p{number}", 3) for number, _ in orders]
        assert await seen(secondary) == held(alive)

    @pytest.mark.parametrize("seed", range(4))
    async def test_any_prefix_again(self, secondary: Secondary, seed: int) -> None:
        """C3: any prefix of a history, applied again in any order and cut in any way, changes nothing."""
        dice = random.Random(seed)  # noqa: S311 - a history that can be drawn again
        history = [(remove if dice.random() < 0.3 else write)(dice.choice("abcd"), n) for n in range(1, 25)]
        for event in history:
            await secondary.apply([event])
        newest = {event.resource_id: event for event in history}
        final = held(event for event in newest.values() if event.content is not None)
        assert await seen(secondary) == final
        again = history[: dice.randint(1, len(history))]
        dice.shuffle(again)
        for batch in _without_repeats(again):
            assert set(_kinds(await secondary.apply(batch))) <= {Applied, Stale}
        assert await seen(secondary) == final

    async def test_late_write_after_delete(self, secondary: Secondary) -> None:
        """What was deleted does not come back."""
        await secondary.apply([write("p", 1)])
        await secondary.apply([remove("p", 3)])
        assert list(await secondary.apply([write("p", 2)])) == [Stale()]
        assert await seen(secondary) == []

    async def test_delete_of_what_is_absent(self, secondary: Secondary) -> None:
        """It is applied, and remembered."""
        assert list(await secondary.apply([remove("p", 2)])) == [Applied()]
        assert list(await secondary.apply([write("p", 1)])) == [Stale()]
        assert await seen(secondary) == []

    async def test_late_delete_after_write(self, secondary: Secondary) -> None:
        """What is newer stays."""
        await secondary.apply([write("p", 2)])
        assert list(await secondary.apply([remove("p", 1)])) == [Stale()]
        assert await seen(secondary) == held([write("p", 2)])

    async def test_write_above_the_tombstone(self, secondary: Secondary) -> None:
        """What is created again lives, and can be deleted again."""
        for event in (write("p", 1), remove("p", 2), write("p", 3), remove("p", 4), write("p", 5)):
            assert list(await secondary.apply([event])) == [Applied()]
            assert await seen(secondary) == held([event])

    async def test_outcomes_in_the_order_of_the_batch(self, secondary: Secondary) -> None:
        """One outcome for each event, also when stale and new, writes and deletes are mixed."""
        names = [f"p{7 * number % 40:02d}" for number in range(40)]
        await secondary.apply([write(name, 50) for name in names[::3]])
        batch = [(remove if number % 2 else write)(name, 9) for number, name in enumerate(names)]
        expected = [Applied if number % 3 else Stale for number in range(40)]
        assert _kinds(await secondary.apply(batch)) == expected

    @pytest.mark.parametrize("lower", [9, 99, 2**31 - 1, 2**53, 2**62, 2**63 - 2])
    async def test_positions_are_exact_integers(self, secondary: Secondary, lower: int) -> None:
        """Neighbours are told apart, not as text and not as binary floats."""
        events = (write("p", lower), write("p", lower + 1), write("p", lower), remove("p", lower))
        outcomes = [_kinds(await secondary.apply([event])) for event in events]
        assert outcomes == [[Applied], [Applied], [Stale], [Stale]]
        assert await seen(secondary) == held([write("p", lower + 1)])

    async def test_odd_ids(self, secondary: Secondary) -> None:
        """All are kept apart, and sorted by their UTF-8 bytes."""
        batch = [write(name, position) for position, name in enumerate(IDS, 1)]
        assert _kinds(await secondary.apply(batch)) == [Applied] * len(IDS)
        assert await seen(secondary) == held(batch)
        await secondary.apply([remove(name, 1_000) for name in IDS[::2]])
        assert await seen(secondary) == held(batch[1::2])

    async def test_scan_resumes_after_any_id(self, secondary: Secondary) -> None:
        """Exactly behind it, whether or not it exists."""
        batch = [write(name, position) for position, name in enumerate(IDS, 1)]
        await secondary.apply(batch)
        for after in (*IDS[::5], "a0", "~", "éé"):
            rest = [event for event in batch if event.resource_id.encode() > after.encode()]
            assert await seen(secondary, after=after) == held(rest)

    async def test_scan_where_nothing_is(self, secondary: Secondary) -> None:
        """A type or tenant that was never written is empty, not an error."""
        assert await seen(secondary) == []
        await secondary.apply([write("p", 1)])
        for place in (("acme", "Unknown"), ("nobody", "Patient")):
            assert await seen(secondary, place) == []

    async def test_tenants_and_types_are_apart(self, secondary: Secondary) -> None:
        """None sees another's, also where their names read alike when joined."""
        tenants = ("a", "A", "a/b", "a/b/c", "a.b", "a_b", "a-b", ".", "..")
        types = ("b", "B", "b:c", "b/c", "c", "%", "*", "b ", "b%3Ac", "é", "e\u0301", "_", "a:b")
        batches = {place: [write("gone", 1, place=place)] for place in product(tenants, types)}
        for position, (place, batch) in enumerate(batches.items(), 2):
            batch += [write(name, position, place=place) for name in ("c", "c:d", "b:c", "b/c")]
        await secondary.apply(list(chain.from_iterable(batches.values())))
        await secondary.apply([remove("gone", 9_000, place) for place in batches])
        for place, batch in batches.items():
            assert await seen(secondary, place) == held(batch[1:])

    @pytest.mark.parametrize("name", CONTENTS)
    async def test_content_to_the_letter(self, secondary: Secondary, name: str) -> None:
        """It is held exactly, or refused without harm to its neighbours."""
        before, odd, behind = write("a", 1), write("b", 2, CONTENTS[name]), write("c", 3)
        refused = name in self.refuses
        outcomes = await secondary.apply([before, odd, behind])
        assert _kinds(outcomes) == [Applied, Rejected if refused else Applied, Applied]
        assert await seen(secondary) == held([before, *([] if refused else [odd]), behind])

    async def test_newer_content_replaces_all(self, secondary: Secondary) -> None:
        """Nothing of the older content is left."""
        await secondary.apply([write("p", 1, '{"a":1,"b":{"c":2},"d":[1,2]}')])
        await secondary.apply([newer := write("p", 2, '{"b":{"e":3}}')])
        assert await seen(secondary) == held([newer])

    @pytest.mark.parametrize(("size", "content"), [(500, ""), (40, CONTENTS["long text"])])
    async def test_great_batches(self, secondary: Secondary, size: int, content: str) -> None:
        """Many events, and many megabytes, are one batch."""
        batch = [write(f"p{number}", number, content) for number in range(1, size + 1)]
        assert _kinds(await secondary.apply(batch)) == [Applied] * size
        assert await seen(secondary) == held(batch)

    async def test_scan_of_thousands(self, secondary: Secondary) -> None:
        """It pages, also past whole pages of what was deleted."""
        batch = [write(f"p{number:04d}", number) for number in range(1, 2_501)]
        for start in range(0, len(batch), 500):
            await secondary.apply(batch[start : start + 500])
        await secondary.apply([remove(event.resource_id, 9_000) for event in batch[300:1_500]])
        assert await seen(secondary) == held(batch[:300] + batch[1_500:])
        assert await seen(secondary, after="p0200") == held(batch[200:300] + batch[1_500:])

    async def test_abandoned_scans(self, secondary: Secondary) -> None:
        """A scan that is not read to its end holds nothing back."""
        await secondary.apply(batch := [write(f"p{number:03d}", number) for number in range(1, 301)])
        assert await seen(secondary) == held(batch)
        for _ in range(20):
            scan = secondary.scan(*PLACE)
            assert (await anext(scan)).resource_id == "p001"
            if isinstance(scan, AsyncGenerator):
                await scan.aclose()
        assert list(await secondary.apply([write("p001", 999)])) == [Applied()]

    async def test_concurrent_batches(self, secondary: Secondary) -> None:
        """Batches of different keys do not disturb each other."""
        batches = [[write(f"p{lane}-{n}", n) for n in range(1, 51)] for lane in range(8)]
        for outcomes in await asyncio.gather(*map(secondary.apply, batches)):
            assert _kinds(outcomes) == [Applied] * 50
        assert await seen(secondary) == held(chain.from_iterable(batches))

    async def test_relay_that_wakes_too_late(self, secondary: Secondary) -> None:
        """Its older batch, beside the newer one of its successor, changes nothing in the end."""
        older = [write(f"p{number}", 1) for number in range(50)]
        newer = [write(f"p{number}", 2) for number in reversed(range(50))]
        answers = await asyncio.gather(*map(secondary.apply, (older, newer, older)))
        assert _kinds(answers[1]) == [Applied] * 50
        assert await seen(secondary) == held(newer)

    async def test_cancelled_apply(self, secondary: Secondary) -> None:
        """Wherever it was stopped, the same batch can be applied again."""
        began = time.monotonic()
        await secondary.apply([write(f"p{number}", 1) for number in range(200)])
        took = time.monotonic() - began
        for step in range(2, 8):
            batch = [write(f"p{number}", step) for number in range(200)]
            applying = asyncio.ensure_future(secondary.apply(batch))
            await asyncio.wait({applying}, timeout=took * (step - 2) / 6)
            applying.cancel()
            await asyncio.wait({applying})
            assert applying.cancelled() or _kinds(applying.result()) == [Applied] * 200
            assert set(_kinds(await secondary.apply(batch))) <= {Applied, Stale}
            assert await seen(secondary) == held(batch)

    async def test_check_and_close(self, secondary: Secondary) -> None:
        """A secondary that can be checked answers; one that can be closed can be closed twice."""
        if isinstance(secondary, Checkable):
            await secondary.check()
        if isinstance(secondary, Closeable):
            await secondary.aclose()
            await secondary.aclose()
