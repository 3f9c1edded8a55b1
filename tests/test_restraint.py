"""Restraint: a backfill works for its share of the time and at its rate, whichever is slower."""

from __future__ import annotations

import time

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from outbox import SettingsError, SyncManager
from outbox.restraint import Restraint

NOWHERE = create_async_engine("postgresql+asyncpg://nobody@127.0.0.1:1/nowhere")


@pytest.mark.parametrize(
    ("rate", "share", "took", "rests"),
    [
        (None, 1, 3.0, 0),
        (None, 0.5, 3.0, 3.0),
        (None, 0.25, 1.0, 3.0),
        (10, 1, 3.0, 0.5),
        (10, 0.5, 0.1, 0.5),
        (10, 0.5, 2.0, 2.0),
    ],
)
def test_it_rests_for_what_its_share_and_its_rate_ask(
    monkeypatch: pytest.MonkeyPatch, rate: float | None, share: float, took: float, rests: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1_000.0)
    restraint = Restraint(NOWHERE, "public", "search", rate=rate, most_owed=None, share=share)
    restraint.note(range(5), took)
    assert restraint._due == 1_000 + rests


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan")])
async def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(SettingsError, match="share"):
        await SyncManager(NOWHERE, []).backfill("search", share=share)
