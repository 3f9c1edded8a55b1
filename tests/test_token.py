"""What a token says of what was recorded: by whichever statement, driver and session."""

from __future__ import annotations

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from outbox import MemorySecondary, SyncEvent, SyncManager, SyncToken, record


@pytest.fixture
async def registered(primary: AsyncEngine) -> AsyncEngine:
    """The primary with two secondaries in its registry, not in the order of their names."""
    for name in ("second", "first"):
        await SyncManager(primary, [MemorySecondary(name)]).register()
    return primary


def notes(count: int) -> list[SyncEvent]:
    return [SyncEvent.create("Note", f"{number}", {"n": number}) for number in range(count)]


@pytest.mark.parametrize(
    ("backend_ids", "owed_to"), [(None, ["first", "second"]), (["second"], ["second"]), (["nobody"], [])]
)
async def test_one_event_and_a_list_are_told_of_alike(
    registered: AsyncEngine, backend_ids: list[str] | None, owed_to: list[str]
) -> None:
    # They are two statements.
    async with registered.begin() as connection:
        tokens = [await record(connection, notes(count), backend_ids=backend_ids) for count in (1, 2)]
    one, two = (token.recorded[0] for token in tokens)
    assert (one.count, two.count) == (1, 2)
    assert [token.backend_ids for token in tokens] == [owed_to, owed_to]
    assert (one.transaction_id, one.stamp) == (two.transaction_id, two.stamp)
    assert max(one.positions) < min(two.positions)


async def test_what_one_transaction_recorded_bit_by_bit_is_one_group(registered: AsyncEngine) -> None:
    async with registered.begin() as connection:
        tokens = [await record(connection, notes(count)) for count in (1, 2, 1)]
    (merged,) = SyncToken.merged(tokens).recorded
    assert merged.count == 4
    assert list(merged.backend_ids) == ["first", "second"]


async def test_a_token_alone_is_what_it_was(registered: AsyncEngine) -> None:
    async with registered.begin() as connection:
        token = await record(connection, notes(1))
    assert SyncToken.merged([token]) is token
    assert SyncToken(str(token)) == token
