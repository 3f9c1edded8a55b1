"""How a claim divides its batch among tenants: full batches for few, a part for everybody, nobody kept waiting."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.lanes import Lanes
from outbox.schema import LANES

BATCHES = st.integers(1, 300)
LANE = st.integers(0, LANES - 1)
MANY = 10**9
# Shared cores: how long one example takes says nothing.
calmly = settings(deadline=None)


def claim(lanes: Lanes, waiting: Counter[int], batch_size: int) -> Counter[int]:
    """Take from the lanes in the order asked, up to their shares, until the batch is full: as the statement does."""
    asked = lanes.shares(batch_size)
    counts: Counter[int] = Counter()
    for lane, share in zip(asked.lanes, asked.shares, strict=True):
        counts[lane] = min(share, waiting[lane], batch_size - counts.total())
    lanes.learn(asked, counts.items(), full=counts.total() >= batch_size)
    waiting.subtract(counts)
    return counts


@calmly
@given(BATCHES, st.sets(LANE), st.integers(0, 5))
def test_every_lane_is_asked_once_for_something_from_its_floor(batch_size: int, busy: set[int], claims: int) -> None:
    """No lane is ever left out, whatever was learnt before."""
    lanes = Lanes()
    lanes.floors = list(range(LANES))
    for _ in range(claims):
        claim(lanes, Counter(dict.fromkeys(busy, MANY)), batch_size)
    asked = lanes.shares(batch_size)
    assert sorted(asked.lanes) == list(range(LANES))
    assert asked.floors == asked.lanes
    assert all(1 <= share <= batch_size for share in asked.shares)


def test_nothing_is_asked_for_no_batch() -> None:
    """A claim that takes a suspect alone asks no lane."""
    asked = Lanes().shares(0)
    assert (asked.lanes, asked.floors, asked.shares) == ([], [], [])


@pytest.mark.parametrize("batch_size", [1, 2, 10, 63, 64, 65, 100, 1000])
@pytest.mark.parametrize("tenants", [1, 2, 3, 10, 64])
def test_batches_are_full_from_the_third_claim_on(batch_size: int, tenants: int) -> None:
    """One tenant or many: with enough waiting, no part of a batch stays empty."""
    lanes, waiting = Lanes(), Counter({(7 * lane) % LANES: MANY for lane in range(tenants)})
    sizes = [claim(lanes, waiting, batch_size).total() for _ in range(10)]
    assert sizes[2:] == [batch_size] * 8


@calmly
@given(BATCHES, st.sets(LANE, min_size=1), st.data())
def test_batches_are_full_again_within_three_claims_of_any_change(
    batch_size: int, before: set[int], data: st.DataObject
) -> None:
    """Those who were busy fall silent and others begin."""
    lanes = Lanes()
    for _ in range(data.draw(st.integers(1, 5))):
        claim(lanes, Counter(dict.fromkeys(before, MANY)), batch_size)
    waiting = Counter(dict.fromkeys(data.draw(st.sets(LANE, min_size=1)), MANY))
    sizes = [claim(lanes, waiting, batch_size).total() for _ in range(5)]
    assert sizes[3:] == [batch_size] * 2


@calmly
@given(BATCHES, st.sets(LANE, min_size=1, max_size=LANES - 1), LANE, st.integers(0, 70))
def test_a_quiet_tenant_is_served_within_three_claims(
    batch_size: int, noisy: set[int], quiet: int, claims: int
) -> None:
    """Promise 7: whoever else floods, as long as a batch has room for one of each."""
    noisy.discard(quiet)
    lanes, waiting = Lanes(), Counter(dict.fromkeys(noisy, MANY))
    for _ in range(claims):
        claim(lanes, waiting, batch_size)
    waiting[quiet] = 1
    needed = 3 if batch_size > len(noisy) else 2 + -(-LANES // batch_size)
    served = [claim(lanes, waiting, batch_size)[quiet] for _ in range(needed)]
    assert sum(served) == 1


@calmly
@given(st.integers(64, 300), st.sets(LANE, min_size=2))
def test_noisy_tenants_get_equal_parts(batch_size: int, noisy: set[int]) -> None:
    """Over many claims nobody of those who always have more gets three times what another gets."""
    lanes, waiting = Lanes(), Counter(dict.fromkeys(noisy, MANY))
    for _ in range(3):
        claim(lanes, waiting, batch_size)
    served: Counter[int] = Counter()
    for _ in range(LANES):
        served += claim(lanes, waiting, batch_size)
    assert max(served[lane] for lane in noisy) < 3 * min(served[lane] for lane in noisy)


def test_a_full_look_forgets_floors_and_nothing_else() -> None:
    """What is known of busy lanes stays."""
    lanes = Lanes()
    claim(lanes, Counter({5: MANY}), 100)
    lanes.floors, lanes.mark, lanes.quiet = [9] * LANES, (1, 2), 1
    lanes.look_everywhere()
    assert (lanes.floors, lanes.mark, lanes.quiet) == ([0] * LANES, None, None)
    asked = lanes.shares(100)
    assert dict(zip(asked.lanes, asked.shares, strict=True))[5] == 100


@calmly
@given(BATCHES, st.dictionaries(LANE, st.integers(1, 700)))
def test_after_a_claim_that_leaves_no_more_nothing_is_left(batch_size: int, waiting: dict[int, int]) -> None:
    """So whoever believes it and looks again a moment later makes nobody wait who could have been taken."""
    lanes, left = Lanes(), Counter(waiting)
    for _ in range(5):
        taken = claim(lanes, left, batch_size)
        assert lanes.taken == taken.total()
        assert lanes.more or not left.total()
